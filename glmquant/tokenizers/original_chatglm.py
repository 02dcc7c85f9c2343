"""ChatGLM-6B's tokenizer: a SentencePiece unigram model whose special tokens come behind the text.

Line breaks, tabs and runs of spaces are pieces of their own. SentencePiece normalizes the text (NFKC and
more), so decoding does not give back every text that was encoded.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers.tokenization_utils_base import PaddingStrategy

from ..errors import SourceError
from .common import load_pieces
from .kind import Kind
from .original import OriginalTokenizer

# Runs of spaces up to this length have a piece.
_LONGEST_RUN = 80
_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_RUN = re.compile(rf" {{2,{_LONGEST_RUN}}}")
_BLANKS = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")


class ChatGLMTokenizer(OriginalTokenizer):
    """The tokenizer of ChatGLM-6B (``ice_text.model``, 130344 pieces).

    ``[gMASK] <sop>`` go behind a text; a pair is ``a [gMASK] <sop> b <eop>``. An encoding has a mask and
    position ids only when it was padded: `attention_mask` bool [1, s, s], True where a key is hidden, and
    `position_ids` int64 [2, s] (see `mask_and_positions`).

    Text that spells a control token (``[gMASK]``, ``<sop>``, ...) stays text, as published, unless
    ``split_special_tokens=False`` is passed. The pieces ``<n>``, ``<|tab|>`` and ``<|blank_k|>`` are found
    in text, as published; they stand for white space only.
    """

    kind: ClassVar[Kind] = "chatglm"
    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "ice_text.model"}

    def __init__(
        self,
        vocab_file: str | PathLike[str],
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **options: Any,
    ) -> None:
        if num_image_tokens:
            raise SourceError(
                f"{vocab_file}: tokenizer_config.json has num_image_tokens {num_image_tokens}, so this is the first "
                "release of ChatGLM-6B (150528 rows), which is not supported; take the current one (130528 rows)."
            )
        self._pieces = load_pieces(Path(vocab_file))
        missing = [text for text in _CONTROL if not self._pieces.is_control(self._pieces.piece_to_id(text))]
        if missing:
            raise SourceError(
                f"{vocab_file} is a SentencePiece model, but not ChatGLM-6B's: it lacks {', '.join(missing)}; "
                "take the file that was published with the model."
            )
        self.end_token = end_token
        self.gmask_token = gmask_token
        # transformers hands over these two under this name as well; they are no named tokens of its own.
        options.pop("model_specific_special_tokens", None)
        inside = self._pieces.get_piece_size()
        decoder = options.pop("added_tokens_decoder", None) or {}
        options["added_tokens_decoder"] = {row: token for row, token in decoder.items() if row >= inside}
        options.setdefault("split_special_tokens", True)
        super().__init__(
            vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **options,
        )

    @property
    def vocab_size(self) -> int:
        """Pieces in the vocabulary, control tokens included."""
        return int(self._pieces.get_piece_size())

    @property
    def gmask_token_id(self) -> int:
        """The id of ``[gMASK]``."""
        return int(self._pieces.piece_to_id(self.gmask_token))

    @property
    def end_token_id(self) -> int:
        """The id of ``</s>``."""
        return int(self._pieces.piece_to_id(self.end_token))

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {self._pieces.id_to_piece(row): row for row in range(self.vocab_size)}
        return {**pieces, **self._added_tokens_encoder}

    def _control_ids(self) -> list[int]:
        return [
            *self.all_special_ids,
            *(self._pieces.piece_to_id(text) for text in _CONTROL),
            self.end_token_id,
        ]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = _RUN.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        return list(self._pieces.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        # The head has more rows than there are pieces; those mean nothing.
        return str(self._pieces.id_to_piece(index)) if 0 <= index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text: padding is dropped, the white space pieces become white space."""
        text = str(self._pieces.decode_pieces([token for token in tokens if token != self.pad_token]))
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANKS.sub(lambda run: " " * int(run[1]), text)

    def _single(self, ids: list[int]) -> list[int]:
        return [*ids, self.gmask_token_id, self.bos_token_id]

    def _pair(self, first: list[int], second: list[int]) -> list[int]:
        return [*self._single(first), *second, self.eos_token_id]

    def _pad(
        self,
        encoded_inputs: dict[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        side = self._left(padding_side)
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        ids = encoded_inputs["input_ids"]
        mask, positions = self.mask_and_positions(ids)
        mask = encoded_inputs.pop("attention_mask", mask)
        positions = encoded_inputs.pop("position_ids", positions)
        # transformers pads the ids; its masks are rows of ones and zeros, which this is not.
        padded: dict[str, Any] = super(OriginalTokenizer, self)._pad(
            encoded_inputs,
            max_length,
            padding_strategy,
            pad_to_multiple_of,
            side,
            return_attention_mask=False,
        )
        extra = len(padded["input_ids"]) - len(ids)
        if return_attention_mask is not False:
            padded["attention_mask"] = np.pad(mask, [(0, 0), (extra, 0), (extra, 0)], constant_values=True)
        padded["position_ids"] = np.pad(positions, [(0, 0), (extra, 0)])
        return padded

    def mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The mask and the positions of an unpadded row, as THUDM's tokenization_chatglm.py has them.

        Tokens before ``<sop>`` see each other; from there on, a token sees what comes before it. The first
        row of positions counts up to ``<sop>`` and then stays at ``[MASK]`` or, without one, ``[gMASK]``;
        the second is 0, and from ``<sop>`` on 1, 2, 3, ...

        Returns:
            bool [1, s, s], True where key (last axis) is hidden from query, and int64 [2, s].
        """
        size = len(ids)
        context = ids.index(self.bos_token_id) if self.bos_token_id in ids else size
        hidden = np.triu(np.ones((1, size, size), dtype=bool), k=1)
        hidden[:, :, :context] = False
        positions = np.stack([np.arange(size), np.maximum(np.arange(size) - context + 1, 0)])
        for mark in (self.mask_token_id, self.gmask_token_id):
            if mark in ids:
                positions[0, context:] = ids.index(mark)
                break
        return hidden, positions
