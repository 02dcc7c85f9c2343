"""What the fast tokenizers share: the outer shape of the two JSON files, and the added tokens.

The files are written as plain data. The ``tokenizers`` library could write ``tokenizer.json`` too,
but its output follows the library's version; these bytes follow only the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import read_json
from ..errors import SourceError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Json = dict[str, Any]

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Token:
    """A token that is found in text before anything else looks at it.

    Attributes:
        text: how it is spelled.
        id: its row in the embedding.
        word: whether it is only found as a word of its own. ``sop`` has no brackets around it;
            without this, ``sophie`` would begin with a special token.
        special: whether ``decode(..., skip_special_tokens=True)`` leaves it out.
    """

    text: str
    id: int
    word: bool = False
    special: bool = True

    def flags(self) -> Json:
        """Spell the token as both files do, without its id."""
        return {
            "content": self.text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": self.word,
            "special": self.special,
        }


def optional_json(path: Path) -> Json:
    """Read the JSON object in `path`; where there is no such file it is empty."""
    return read_json(path) if path.exists() else {}


def read_vocabulary(path: Path) -> bytes:
    """Read a vocabulary file, and rule out the two commonest accidents of downloading."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    if not data:
        raise SourceError(f"{path} is empty; download the file again.")
    if data.startswith(_LFS_POINTER):
        raise SourceError(
            f"{path} is a Git LFS pointer and not the vocabulary itself; "
            "run `git lfs pull` there, or download the file."
        )
    return data


def load_pieces(path: Path) -> SentencePieceProcessor:
    """Load a SentencePiece model.

    Raises:
        SourceError: the file is missing, damaged, or of another kind.
    """
    from sentencepiece import SentencePieceProcessor

    data = read_vocabulary(path)
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(data)
    except RuntimeError:
        raise SourceError(
            f"{path} ({len(data)} bytes) is damaged, or is not a SentencePiece model; "
            "download the file again."
        ) from None
    return pieces


def added_tokens(known: Sequence[str], first: int, config: Json, path: Path) -> list[Token]:
    """List the tokens behind a vocabulary: the `known` ones, then what a fine-tune has added.

    Args:
        known: the published tokens, in order.
        first: the id of the first of them, which is the number of entries in the vocabulary.
        config: ``tokenizer_config.json``, of which ``added_tokens_decoder`` is read.
        path: where `config` is, for messages.

    Raises:
        SourceError: `config` is malformed, or contradicts the vocabulary.
    """
    tokens = {}
    for row, text in enumerate(known, first):
        tokens[row] = Token(text, row, word=text.isalpha())
    behind = first + len(known)
    try:
        for key, entry in (config.get("added_tokens_decoder") or {}).items():
            row, text = int(key), str(entry["content"])
            word, special = bool(entry.get("single_word")), bool(entry.get("special", True))
            if row >= behind:
                tokens[row] = Token(text, row, word, special)
            elif row >= first and tokens[row].text != text:
                raise SourceError(
                    f"added_tokens_decoder in {path} gives id {row} to {text!r}, but behind the "
                    f"{first} entries of the vocabulary beside it that is {tokens[row].text!r}; "
                    "take both files from one model."
                )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(
            f"added_tokens_decoder in {path} is malformed: every id needs an object with content."
        ) from None
    rows = sorted(tokens)
    if rows[-1] != first + len(rows) - 1:
        raise SourceError(
            f"added_tokens_decoder in {path} skips ids: the published tokens end at {behind - 1} "
            f"and it has {rows[len(known) :]}; take it and the vocabulary from one model."
        )
    if len({token.text for token in tokens.values()}) != len(tokens):
        raise SourceError(f"added_tokens_decoder in {path} gives two ids to one token.")
    return [tokens[row] for row in rows]


def tokenizer_json(
    *,
    added: Sequence[Token],
    prefix: Sequence[Token],
    closing: Token,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    model: Json,
) -> bytes:
    """Write ``tokenizer.json``.

    Args:
        added: every token that is found in raw text.
        prefix: tokens in front of each encoded text.
        closing: the token behind a pair of texts (THUDM's code closes pairs, not single texts).
        normalizer: what happens to the text between added tokens.
        pre_tokenizer: how normalized text is cut before merging.
        decoder: how tokens become text.
        model: vocabulary and merges.
    """
    front = [_piece("SpecialToken", token.text) for token in prefix]
    first, second = _piece("Sequence", "A"), _piece("Sequence", "B")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id, **token.flags()} for token in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*front, first],
            "pair": [*front, first, second, _piece("SpecialToken", closing.text)],
            "special_tokens": {
                token.text: {"id": token.text, "ids": [token.id], "tokens": [token.text]}
                for token in (*prefix, closing)
            },
        },
        "decoder": decoder,
        "model": model,
    }
    # On one line: indented, the merges alone would take over a million.
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _piece(kind: str, name: str) -> Json:
    return {kind: {"id": name, "type_id": 0}}


def tokenizer_config(*, added: Sequence[Token], named: Mapping[str, str], more: Json) -> bytes:
    """Write ``tokenizer_config.json``.

    Args:
        added: every token that is found in raw text.
        named: ``eos_token`` and its like.
        more: further entries; those that are None are left out.
    """
    others = [token for token in added if token.special and token.text not in named.values()]
    config = {
        # With these, transformers does not look at a special_tokens_map.json or added_tokens.json
        # that an older version left in the folder.
        "added_tokens_decoder": {str(token.id): token.flags() for token in added},
        "additional_special_tokens": [token.text for token in others],
        "clean_up_tokenization_spaces": False,
        # Without token_type_ids, which the model does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        **{key: value for key, value in more.items() if value is not None},
    }
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def context_length(folder: Path, tokenizer: Json) -> int | None:
    """Find ``model_max_length``: what the model's config says, then what the tokenizer's says."""
    model = optional_json(folder / "config.json")
    for value in (
        model.get("seq_length"),
        model.get("max_position_embeddings"),
        tokenizer.get("model_max_length"),
    ):
        if isinstance(value, int):
            return value
    return None
