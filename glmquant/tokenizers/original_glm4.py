"""GLM-4-9B-chat's tokenizer: a tiktoken vocabulary with special tokens behind it.

The vocabulary is handed to tiktoken by us. tiktoken's own loader would look for it on the network and
keep a copy.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import tiktoken

from ..errors import SourceError
from .glm4 import END, TOKENS, WORDS, byte_alphabet, read_ranks
from .kind import Kind
from .original import OriginalTokenizer, tokens_behind

_SPELLED = dict(enumerate(byte_alphabet()))
_BYTES = {character: byte for byte, character in _SPELLED.items()}


class ChatGLM4Tokenizer(OriginalTokenizer):
    """The tokenizer of GLM-4-9B-chat (``tokenizer.model``, 151329 ranks and 14 tokens behind them).

    ``[gMASK] <sop>`` go in front of a text; a pair is ``[gMASK] <sop> a b <|endoftext|>`` (THUDM's code asks
    there for a token that does not exist). As published, text that spells a special token becomes it, which
    the chat template relies on; with ``split_special_tokens=True`` it stays text.
    """

    kind: ClassVar[Kind] = "glm4"

    def __init__(self, vocab_file: str | PathLike[str], **options: Any) -> None:
        ranks = read_ranks(Path(vocab_file))
        if any(text.encode() in ranks for text in TOKENS):
            raise SourceError(
                f"{vocab_file} is a tiktoken vocabulary, but not GLM-4's: it has a special token among its ranks; "
                "take the file that was published with the model."
            )
        self._ranks = len(ranks)
        self._encoding = tiktoken.Encoding(
            "glm4", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=self._ranks
        )
        tokens = tokens_behind(TOKENS, self._ranks, options, str(vocab_file))
        options["added_tokens_decoder"] = tokens
        extra = [token.content for token in tokens.values() if token.special]
        options.setdefault("additional_special_tokens", extra)
        options.setdefault("eos_token", END)
        options.setdefault("pad_token", END)
        super().__init__(vocab_file, **options)

    @property
    def vocab_size(self) -> int:
        """Ranks in the vocabulary, without the special tokens."""
        return self._ranks

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id; bytes are spelled as in ``tokenizer.json``."""
        return {
            **{self._convert_id_to_token(row): row for row in range(self._ranks)},
            **self._added_tokens_encoder,
        }

    def get_prefix_tokens(self) -> list[int]:
        """The ids in front of every text: ``[gMASK] <sop>``."""
        return [self._added_tokens_encoder["[gMASK]"], self._added_tokens_encoder["<sop>"]]

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of a conversation; see `glmquant.prompts.GLM4Prompt.message_ids`."""
        from ..prompts import GLM4Prompt

        prompt = GLM4Prompt(self)
        said = {"role": role, "metadata": metadata, "content": message}
        return list(prompt.message_ids(*prompt.history([said])))

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._convert_id_to_token(row) for row in self._encoding.encode_ordinary(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        try:
            return int(self._encoding.encode_single_token(_bytes(token)))
        except KeyError:
            return None

    def _convert_id_to_token(self, index: int) -> str:
        # The head has more rows than there are tokens; those mean nothing.
        if not 0 <= index < self._ranks:
            return ""
        return "".join([_SPELLED[byte] for byte in self._encoding.decode_single_token_bytes(index)])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text; bytes that are no character become U+FFFD."""
        return b"".join(map(_bytes, tokens)).decode(errors="replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **_: Any,
    ) -> str:
        tokens = self.convert_ids_to_tokens(
            [token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens=skip_special_tokens
        )
        parts: list[str] = []
        plain: list[str] = []
        for token in tokens:
            if token in self._added_tokens_encoder:
                parts += [self.convert_tokens_to_string(plain)] * bool(plain) + [token]
                plain = []
            else:
                plain.append(token)
        parts += [self.convert_tokens_to_string(plain)] * bool(plain)
        text = (" " if spaces_between_special_tokens else "").join(parts)
        clean = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else clean_up_tokenization_spaces
        )
        return str(self.clean_up_tokenization(text)) if clean else text

    def _single(self, ids: list[int]) -> list[int]:
        return [*self.get_prefix_tokens(), *ids]

    def _pair(self, first: list[int], second: list[int]) -> list[int]:
        return [*self._single(first), *second, self._added_tokens_encoder[END]]


def _bytes(token: str) -> bytes:
    # A special token that an added word or a fine-tune spells with other characters is its own text.
    if all(character in _BYTES for character in token):
        return bytes([_BYTES[character] for character in token])
    return token.encode()
