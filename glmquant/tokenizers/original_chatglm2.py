"""ChatGLM2-6B's and ChatGLM3-6B's tokenizers: SentencePiece byte-pair pieces, special tokens behind them.

Both read the same vocabulary. ChatGLM3 has four role tokens more, and prints special tokens when it
decodes, where ChatGLM2 leaves them out.
"""

from __future__ import annotations

import re
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from ..errors import SourceError, UsageError
from .chatglm import GUARD, ROLE_TOKENS, TOKENS
from .common import load_pieces
from .kind import Kind
from .original import OriginalTokenizer, tokens_behind

_ROLES = re.compile("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")")


class ChatGLM2Tokenizer(OriginalTokenizer):
    """The tokenizer of ChatGLM2-6B (``tokenizer.model``, 64789 pieces and five tokens behind them).

    ``[gMASK] sop`` go in front of a text; a pair is ``[gMASK] sop a b </s>``. Text that spells a special
    token stays text; with ``split_special_tokens=False``, tokens that a fine-tune added are found.
    """

    kind: ClassVar[Kind] = "chatglm2"

    def __init__(self, vocab_file: str | PathLike[str], **options: Any) -> None:
        self._pieces = load_pieces(Path(vocab_file))
        inside = self._pieces.get_piece_size()
        published = TOKENS[self.kind]
        clash = [text for text in published if not self._pieces.is_unknown(self._pieces.piece_to_id(text))]
        if clash or [self._pieces.id_to_piece(row) for row in range(3)] != ["<unk>", "<s>", "</s>"]:
            raise SourceError(
                f"{vocab_file} is a SentencePiece model, but not the one of ChatGLM2 and ChatGLM3; "
                "take the file that was published with the model."
            )
        self._special = {text: row for row, text in enumerate(published, inside)}
        self._special_texts = {row: text for text, row in self._special.items()}
        tokens = tokens_behind(published, inside, options, str(vocab_file))
        options["added_tokens_decoder"] = {
            row: token for row, token in tokens.items() if row not in self._special_texts
        }
        # They are fixed; a saved copy may list them.
        for name in (*self.SPECIAL_TOKENS_ATTRIBUTES, "additional_special_tokens", "extra_special_tokens"):
            options.pop(name, None)
        options.setdefault("split_special_tokens", True)
        super().__init__(vocab_file, **options)

    eos_token = property(lambda self: "</s>")
    eos_token_id = property(lambda self: self._pieces.eos_id())
    pad_token = property(lambda self: "<unk>")
    pad_token_id = property(lambda self: self._pieces.unk_id())

    @property
    def vocab_size(self) -> int:
        """Pieces and published special tokens."""
        return int(self._pieces.get_piece_size()) + len(self._special)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {self._pieces.id_to_piece(row): row for row in range(self._pieces.get_piece_size())}
        return {**pieces, **self._special, **self._added_tokens_encoder}

    def get_command(self, token: str) -> int:
        """The id of a special token: ``[gMASK]``, ``sop``, ...; for ChatGLM3 also ``<|user|>`` and its like.

        Raises:
            UsageError: there is no such special token.
        """
        named = {
            "<bos>": self._pieces.bos_id(),
            "<eos>": self._pieces.eos_id(),
            "<pad>": self._pieces.unk_id(),
        }
        row = self._special.get(token, named.get(token))
        if row is None:
            raise UsageError(
                f"{token!r} is not a special token; there are {', '.join([*self._special, *named])}."
            )
        return int(row)

    def get_prefix_tokens(self) -> list[int]:
        """The ids in front of every text: ``[gMASK] sop``."""
        return [self._special["[gMASK]"], self._special["sop"]]

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """The text of ChatGLM2-6B's prompt, without ``[gMASK] sop``; see `glmquant.prompts`."""
        from ..prompts import ChatGLM2Prompt

        if self.kind != "chatglm2":
            raise UsageError("ChatGLM3's prompt is no text; use build_chat_input, or model.chat.")
        prompt = ChatGLM2Prompt(self)
        return prompt.text(query, prompt.history(history))

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        *,
        tokenize: bool = True,
        return_dict: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Ids of the published ``chat()``; see transformers for the arguments.

        The template is the one that converted folders get. What later ChatGLM3 folders carry is an
        approximation, and cannot say which text is a role.
        """
        options["chat_template"] = (files(__package__) / f"{self.kind}.jinja").read_text(encoding="utf-8")
        rendered = super().apply_chat_template(conversation, tools, tokenize=False, **options)
        texts = [rendered] if isinstance(rendered, str) else rendered
        if not tokenize:
            plain = [text.replace(GUARD, "") for text in texts]
            return plain[0] if isinstance(rendered, str) else plain
        ids = [self._rendered_ids(text) for text in texts]
        encoding = self(
            ids[0] if isinstance(rendered, str) else ids,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoding if return_dict else encoding["input_ids"]

    def _rendered_ids(self, text: str) -> list[int]:
        # The template breaks what messages say by a guard, so a special token here is the template's own.
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self._special)) + ")", text):
            ids += (
                [self._special[part]]
                if part in self._special
                else self._pieces.encode(part.replace(GUARD, ""))
            )
        return ids

    def _control_ids(self) -> list[int]:
        return [0, 1, 2, *self._special_texts]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self._pieces.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        # No piece is spelled like a special token; that was checked.
        return int(self._special[token] if token in self._special else self._pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        # The head has more rows than there are tokens, and any of them can be sampled.
        inside = 0 <= index < self._pieces.get_piece_size()
        return str(self._pieces.id_to_piece(index)) if inside else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; the one space in front that SentencePiece imagined is dropped."""
        return str(self._pieces.decode_pieces(tokens))

    def _single(self, ids: list[int]) -> list[int]:
        return [*self.get_prefix_tokens(), *ids]

    def _pair(self, first: list[int], second: list[int]) -> list[int]:
        return [*self._single(first), *second, self.eos_token_id]


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """The tokenizer of ChatGLM3-6B and -32K: ChatGLM2-6B's, and the four role tokens.

    Args:
        vocab_file: ``tokenizer.model``.
        encode_special_tokens: text that spells one of the role tokens becomes that token. Not for text
            from a stranger.
        options: as for every transformers tokenizer.
    """

    kind: ClassVar[Kind] = "chatglm3"

    def __init__(
        self, vocab_file: str | PathLike[str], encode_special_tokens: bool = False, **options: Any
    ) -> None:
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, encode_special_tokens=encode_special_tokens, **options)

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of a conversation."""
        said = {"role": role, "metadata": metadata, "content": message}
        prompt = self._prompt()
        return list(prompt.message_ids(*prompt.history([said])))

    def build_chat_input(
        self, query: str, history: list[dict[str, Any]] | None = None, role: str = "user"
    ) -> Any:
        """What ``model.chat`` feeds to the model: tensors [1, seq]."""
        prompt = self._prompt()
        return self.pad(
            {"input_ids": [prompt.ids(query, prompt.history(history), role)]}, return_tensors="pt"
        )

    def _prompt(self) -> Any:
        from ..prompts import prompt_for

        return prompt_for(self, encode_special_tokens=self.encode_special_tokens)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if not self.encode_special_tokens:
            return super()._tokenize(text)
        tokens: list[str] = []
        for part in _ROLES.split(text):
            tokens += [part] if part in ROLE_TOKENS else super()._tokenize(part)
        return tokens

    def _convert_id_to_token(self, index: int) -> str:
        return self._special_texts.get(index) or super()._convert_id_to_token(index)
