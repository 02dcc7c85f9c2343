"""THUDM's own tokenizers on today's transformers: what the four have in common.

The classes give the ids, the decoded text and the padding of the tokenizer code that THUDM published
with each model. They read the vocabulary as it was published and run no code from a folder.

THUDM's code broke with transformers' releases because it set attributes after the base class had asked
for them, and because it filled in the base class's `_pad` with an older signature. Here everything that
the base class may ask for is there before it is initialized.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AddedToken, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy

from ..errors import SourceError, UsageError
from .common import added_tokens

if TYPE_CHECKING:
    from os import PathLike

    from .kind import Kind


class OriginalTokenizer(PreTrainedTokenizer, ABC):  # type: ignore[misc]
    """What ChatGLM-6B's, ChatGLM2-6B's, ChatGLM3-6B's and GLM-4-9B-chat's tokenizers share.

    Padding is on the left, and a padded encoding has position ids: 0 for padding, then 0, 1, 2, ...

    Attributes:
        kind: which of THUDM's tokenizers this is.
        vocab_file: the vocabulary that was loaded.
    """

    kind: ClassVar[Kind]
    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(self, vocab_file: str | PathLike[str], **options: Any) -> None:
        self.vocab_file = str(vocab_file)
        # It names Python files of the folder; a saved copy has none.
        options.pop("auto_map", None)
        super().__init__(**options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load the tokenizer of a folder; nothing in it is run, nothing is fetched.

        ChatGLM2-6B and 3-6B were published with the class name ChatGLMTokenizer too, so for their folders
        ``ChatGLMTokenizer.from_pretrained`` returns a ChatGLM2Tokenizer or ChatGLM3Tokenizer.

        Raises:
            SourceError: the folder or a file is missing or damaged, or the vocabulary is not the model's.
        """
        from .loading import check_rows, class_for, model_folder

        folder = model_folder(pretrained_model_name_or_path)
        if cls.kind == "chatglm":
            cls = class_for(folder)
        if not (folder / cls.vocab_files_names["vocab_file"]).is_file():
            raise SourceError(
                f"{folder} has no {cls.vocab_files_names['vocab_file']}, the vocabulary of its tokenizer; "
                "download the file."
            )
        kwargs["local_files_only"] = True
        tokenizer = super().from_pretrained(str(folder), *args, **kwargs)
        check_rows(tokenizer, folder)
        return tokenizer

    # --- filled in by each tokenizer ---

    @abstractmethod
    def _single(self, ids: list[int]) -> list[int]:
        """`ids` of one text with the automatic special tokens."""

    @abstractmethod
    def _pair(self, first: list[int], second: list[int]) -> list[int]:
        """The ids of two texts with the automatic special tokens."""

    # --- what transformers calls ---

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add the automatic special tokens to one text or a pair."""
        return self._single(token_ids_0) if token_ids_1 is None else self._pair(token_ids_0, token_ids_1)

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where a special token is, 0 elsewhere."""
        if already_has_special_tokens:
            special = set(self._control_ids())
            return [int(row in special) for row in token_ids_0]
        second = None if token_ids_1 is None else [-1] * len(token_ids_1)
        built = self.build_inputs_with_special_tokens([-1] * len(token_ids_0), second)
        return [int(row != -1) for row in built]

    def _control_ids(self) -> list[int]:
        return list(self.all_special_ids)

    def _pad(
        self,
        encoded_inputs: dict[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        ids = encoded_inputs["input_ids"]
        encoded_inputs.setdefault("position_ids", list(range(len(ids))))
        padded: dict[str, Any] = super()._pad(
            encoded_inputs,
            max_length=max_length,
            padding_strategy=padding_strategy,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=self._left(padding_side),
            return_attention_mask=return_attention_mask,
        )
        extra = len(padded["input_ids"]) - len(ids)
        padded["position_ids"] = [0] * extra + padded["position_ids"]
        return padded

    def _left(self, padding_side: str | None) -> str:
        if (padding_side or self.padding_side) != "left":
            raise UsageError(
                "ChatGLM and GLM-4 tokenizers pad on the left only; leave padding_side as it is."
            )
        return "left"

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the vocabulary, byte for byte."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if not target.exists() or not target.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def tokens_behind(
    known: tuple[str, ...], first: int, options: dict[str, Any], vocab_file: str
) -> dict[int, AddedToken]:
    """Take ``added_tokens_decoder`` out of `options` and check it: the tokens behind a vocabulary.

    Args:
        known: the published tokens behind the vocabulary, in order.
        first: the id of the first of them.
        options: what ``tokenizer_config.json`` holds.
        vocab_file: for messages.

    Returns:
        The published tokens and those that a fine-tune has added, by id.

    Raises:
        SourceError: an entry contradicts the vocabulary.
    """
    stated = options.pop("added_tokens_decoder", None) or {}
    entries = {str(row): token.__getstate__() for row, token in stated.items()}
    path = Path(vocab_file).with_name("tokenizer_config.json")
    tokens = added_tokens(known, first, {"added_tokens_decoder": entries}, path)
    return {
        token.id: AddedToken(token.text, single_word=token.word, special=token.special, normalized=False)
        for token in tokens
    }
