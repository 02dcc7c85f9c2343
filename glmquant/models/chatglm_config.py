"""``config.json`` with model_type ``chatglm``, as THUDM published it with every generation."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import UsageError


class ChatGLMConfig(PreTrainedConfig):
    """Configuration of ChatGLM-6B; it also holds that of ChatGLM2-6B, 3 and GLM-4-9B-chat as it was found.

    The second family of fields (`padded_vocab_size`, `ffn_hidden_size`, `seq_length` ...) has no defaults here: what
    config.json gives becomes an attribute under its own name.

    Args:
        num_layers: transformer blocks, transformers' `num_hidden_layers`.
        vocab_size: rows of the embedding.
        inner_hidden_size: width of the MLP.
        max_sequence_length: the longest prompt, in tokens.
        bos_token_id: ``<sop>``, which ends the prompt.
        eos_token_id: ``<eop>``; a list in GLM-4-9B-chat.
        gmask_token_id: ``[gMASK]``. The first release of ChatGLM-6B left it and `mask_token_id` out; then they are
            3 and 4 below `bos_token_id`, as in both published vocabularies.
        mask_token_id: ``[MASK]``.
        rotary_dtype: ``float16`` or ``float32``, the precision of the rotary angles; None chooses as the published
            code does, see `glmquant.models.chatglm_positions.rotary_tables`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}

    # Those without a default are always written to config.json, by which the generations are told apart.
    num_layers: int = 28
    hidden_size: int = 4096
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    vocab_size: int | None = None
    inner_hidden_size: int | None = None
    max_sequence_length: int | None = None
    position_encoding_2d: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    gmask_token_id: int | None = None
    mask_token_id: int | None = None
    rotary_dtype: str | None = None
    use_cache: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rotary_dtype not in (None, "float16", "float32"):
            raise UsageError(f"rotary_dtype is {self.rotary_dtype!r}; use float16, float32 or nothing.")
        later = "padded_vocab_size" in kwargs
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = not later
        if self.vocab_size is None:
            self.vocab_size = kwargs.get("padded_vocab_size")
        if not later and self.bos_token_id is not None:
            if self.gmask_token_id is None:
                self.gmask_token_id = self.bos_token_id - 3
            if self.mask_token_id is None:
                self.mask_token_id = self.bos_token_id - 4
        super().__post_init__(**kwargs)

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest sequence in tokens, under the name by which transformers asks for it."""
        return self.max_sequence_length or getattr(self, "seq_length", None)
