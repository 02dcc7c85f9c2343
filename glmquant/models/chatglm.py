"""ChatGLM-6B as a model of transformers 5, after THUDM's modeling_chatglm.py.

Three things set it apart from later transformers: the residual branches start at the *output* of the LayerNorms,
scaled by alpha; the fused projection holds each head's q, k and v next to each other; positions and masks are
those of `chatglm_positions`. THUDM's code divides scores by the layer's number and multiplies them by it again in
float32, to stay within float16; here queries are scaled before the product, and the softmax is in float32.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..errors import UsageError
from ..families import Dims
from ..families.chatglm import FAMILY
from .beside_chat import BesideChatMixin
from .chat import ChatMixin
from .chatglm_config import ChatGLMConfig
from .chatglm_positions import (
    hold_first_row,
    padding_of,
    rotary_tables,
    rotate,
    two_row_positions,
)
from .quantized import OutputHead
from .runtime import RuntimeMixin

# THUDM's code never tells a block how many there are: it is 28 whatever `num_layers` says.
_ALPHA = math.sqrt(2 * 28)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, which also returns its weights; see transformers' attention interface."""
    # In float32, as THUDM's scores fit into float16 only after their division by the layer's number.
    scores = torch.matmul(query.float() * scaling, key.float().transpose(2, 3))
    if attention_mask is not None:
        # The lowest number of float16, which says "not seen", is within reach of these scores.
        unseen = attention_mask == torch.finfo(attention_mask.dtype).min
        scores = (scores + attention_mask).masked_fill(unseen, torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(-1).to(query.dtype), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    """Multi-head attention; query_key_value is [head, (q, k, v), head_dim] along its output."""

    def __init__(self, config: ChatGLMConfig, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = dims.head_dim
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(dims.hidden, 3 * dims.hidden)
        self.dense = nn.Linear(dims.hidden, dims.hidden)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_dim)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(mixed.reshape(batch, length, -1)), weights


class ChatGLMMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(dims.hidden, dims.ffn)
        self.dense_4h_to_h = nn.Linear(dims.ffn, dims.hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(
            functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh")
        )
        return output


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer; the residuals are LayerNorm outputs times alpha."""

    def __init__(self, config: ChatGLMConfig, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(dims.hidden, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, dims, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(dims.hidden, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(dims)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        normed = self.post_attention_layernorm(_ALPHA * normed + self.attention(normed, **kwargs)[0])
        output: Tensor = _ALPHA * normed + self.mlp(normed)
        return output


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules: ClassVar[list[str]] = ["ChatGLMBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": ChatGLMBlock,
        "attentions": ChatGLMAttention,
    }
    # Every layer of a published checkpoint stores its rotary frequencies; they are computed here.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]


class ChatGLMModel(ChatGLMPreTrainedModel):
    """ChatGLM-6B without its head: token ids to hidden states."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        # The table also says what is missing or unknown in the configuration.
        dims = FAMILY.dims(config.to_dict())
        self.head_dim, self.vocab_size = dims.head_dim, dims.vocab
        self.word_embeddings = nn.Embedding(dims.vocab, dims.hidden)
        self.layers = nn.ModuleList([ChatGLMBlock(config, dims, i) for i in range(dims.layers)])
        self.final_layernorm = nn.LayerNorm(dims.hidden, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, cached + length] with 0 for padding; or THUDM's, bool [batch, 1, length, length]
                with True for what a token may NOT see; or a float one, which is added to the scores.
            position_ids: [batch, 2, length]; needed with `inputs_embeds` or a filled cache, else computed.
            past_key_values: what earlier calls have seen. A prompt has to come in one piece, since its tokens see
                each other.
            inputs_embeds: [batch, length, hidden], in place of `input_ids`.
            use_cache: return a cache.
            kwargs: see transformers (`output_hidden_states`, `output_attentions`, `return_dict`).

        Raises:
            UsageError: ids outside of the vocabulary, a prompt that is too long, or has no ``[gMASK] <sop>``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give ChatGLM-6B either input_ids or inputs_embeds, and not both.")
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if input_ids is not None:
            self._check_ids(input_ids, cached)
            inputs_embeds = self.word_embeddings(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            if input_ids is None or cached:
                raise UsageError("inputs_embeds, and input_ids on a filled cache, need position_ids as well.")
            padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            position_ids = two_row_positions(self.config, input_ids, padding)
        elif position_ids.ndim != 3 or position_ids.shape[1:] != (2, inputs_embeds.shape[1]):
            raise UsageError(
                f"position_ids have shape {list(position_ids.shape)}; ChatGLM-6B has two rows of them, "
                f"[batch, 2, {inputs_embeds.shape[1]}]."
            )
        mask = self._mask(inputs_embeds, attention_mask, position_ids, past_key_values, cached)
        angles = getattr(torch, self.config.rotary_dtype) if self.config.rotary_dtype else None
        rotary = rotary_tables(position_ids, self.head_dim, inputs_embeds.dtype, angles)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                rotary=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states),
            past_key_values=past_key_values,
        )

    def _check_ids(self, input_ids: Tensor, cached: int | Tensor) -> None:
        """Once for every prompt; single tokens on a cache are the model's own, and looking would stall a GPU."""
        length = input_ids.shape[1]
        if torch.compiler.is_compiling() or input_ids.is_meta or length == 0 or (length == 1 and cached):
            return
        longest = self.config.max_sequence_length
        if longest and length > longest:
            raise UsageError(
                f"the prompt has {length} tokens and this model takes {longest} (max_sequence_length); shorten the "
                "text or its history."
            )
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(
                f"input_ids holds {low if low < 0 else high}, and the vocabulary has ids 0 to "
                f"{self.config.vocab_size - 1}; do tokenizer and model belong together?"
            )

    def _mask(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        cached: int | Tensor,
    ) -> Tensor | None:
        """The mask as the attention function of the model takes it, [batch, 1, length, keys] or None."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim > 2:
            if attention_mask.dtype != torch.bool:
                return attention_mask
            masked = attention_mask if attention_mask.ndim == 4 else attention_mask[:, None]
            seen = ~masked[:, :, -length:]
            if self.config._attn_implementation != "eager":
                return seen
            lowest = torch.finfo(inputs_embeds.dtype).min
            return torch.zeros_like(seen, dtype=inputs_embeds.dtype).masked_fill(~seen, lowest)
        blocks = None
        if length > 1:
            context = position_ids[:, 1] == 0
            if not cached:
                blocks = torch.where(context, 0, -1)  # tokens of one block see each other
            elif context.any():
                raise UsageError(
                    "the prompt of ChatGLM-6B has to come in one piece, since its tokens see each other; leave out "
                    "prefill_chunk_size, or pass no cache."
                )
        mask: Tensor | None = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            block_sequence_ids=blocks,
        )
        return mask


class ChatGLMForConditionalGeneration(
    ChatMixin, BesideChatMixin, RuntimeMixin, ChatGLMPreTrainedModel, GenerationMixin
):
    """ChatGLM-6B with its head; parameters are named as in THUDM's checkpoints."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = OutputHead(config.hidden_size, self.transformer.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [batch, length, vocab]; see `ChatGLMModel.forward`.

        `labels` [batch, length] are the input ids with -100 where no loss is wanted; they are shifted here.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # The hooks of `generate`, in the order in which it calls them.

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str, dict[str, Any]]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim > 2 and name == "input_ids":
            model_kwargs["attention_mask"] = padding_of(mask, inputs, self.config)
        return inputs, name, model_kwargs

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        if inputs_tensor.is_floating_point():
            raise UsageError("generate with inputs_embeds needs position_ids [batch, 2, length] as well.")
        return two_row_positions(self.config, inputs_tensor, model_kwargs.get("attention_mask"))

    def _expand_inputs_for_generation(
        self, *args: Any, expand_size: int = 1, position_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers takes the first of three dimensions for something else than the batch
        input_ids, kwargs = super()._expand_inputs_for_generation(*args, expand_size=expand_size, **kwargs)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one forward call; `position_ids` were continued in both rows, and only row 1 should be."""
        if position_ids is not None:
            position_ids = hold_first_row(position_ids)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Leave the mask to `forward`, which knows the prompt; transformers asks with static caches."""
        return attention_mask
