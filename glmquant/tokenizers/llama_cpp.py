"""The vocabulary of a folder as llama.cpp wants it in a GGUF file.

Built from the fast tokenizer (see `fast_tokenizer_files`), whatever the folder holds. llama.cpp knows two kinds that
concern us: ``llama`` joins the pieces with the best score, as SentencePiece does for ChatGLM2 and 3, and ``gpt2`` joins
by a list of merges over bytes, as GLM-4. How text is cut before merging it knows by names only (``pre``).

Two things are not as in the folder:

* ChatGLM2's and 3's tokens ``sop`` and ``eop`` are spelled ``<sop>`` and ``<eop>``: llama.cpp looks for special tokens
  anywhere in a prompt, and ``sophisticated`` would begin with one.
* The chat template does not guard what messages say with U+FDD0, which llama.cpp's tokenizers do not drop: there, a
  message can forge a special token, as with every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import SourceError
from . import fast_tokenizer_files
from .common import Json, optional_json
from .glm4 import WORDS

# What stands for bytes in a SentencePiece vocabulary.
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_RESPELLED = {"sop": "<sop>", "eop": "<eop>"}


class TokenType(IntEnum):
    """As GGUF numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.*`` in a GGUF file says.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pre: how text is cut into words.
        tokens: one for each row of the embedding.
        types: of each token.
        scores: of each token; ``llama`` only.
        merges: pairs with a space between; ``gpt2`` only.
        special: ids by the name that GGUF gives them: eos, eot, eom, unknown, padding.
        template: the chat template, in Jinja; None without.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    special: Mapping[str, int]
    template: str | None


def vocabulary(folder: Path, rows: int, config: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of the model in `folder`; None where it has no tokenizer that can be fast.

    Args:
        folder: a model folder.
        rows: of the embedding; rows beyond the tokenizer's become unused tokens.
        config: ``config.json``, for the ids that end an answer.

    Raises:
        SourceError: a file is damaged, or llama.cpp has nothing like this tokenizer.
    """
    paths = [
        folder / name
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    ]
    state = tuple((str(path), path.stat().st_mtime_ns) for path in paths if path.exists())
    if not state:
        return None
    stops = config.get("eos_token_id")
    return _vocabulary(folder, state, rows, tuple(stops) if isinstance(stops, list) else (stops,))


@lru_cache(maxsize=2)  # planning asks several times, and GLM-4's merges take a second
def _vocabulary(folder: Path, state: object, rows: int, stops: tuple[int | None, ...]) -> Vocabulary | None:
    made = fast_tokenizer_files(folder)
    if made is None and not (folder / "tokenizer.json").exists():
        return None  # ChatGLM-6B's, or none
    if made is None:
        data, settings = (
            (folder / "tokenizer.json").read_bytes(),
            optional_json(folder / "tokenizer_config.json"),
        )
    else:
        data, settings = made["tokenizer.json"], json.loads(made["tokenizer_config.json"])
    try:
        document = json.loads(data)
        model, added = document["model"], {int(t["id"]): t for t in document["added_tokens"]}
        by_id = {row: text for text, row in model["vocab"].items()} | {
            row: t["content"] for row, t in added.items()
        }
        size = max(by_id) + 1
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{folder / 'tokenizer.json'} is damaged ({error!r}); download it again.") from None
    if size > rows:
        raise SourceError(
            f"the tokenizer in {folder} has {size} tokens, the embedding {rows} rows; "
            "do tokenizer and model belong together?"
        )
    pieces = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token")
    tokens: list[str] = []
    types: list[TokenType] = []
    for row in range(rows):
        text = by_id.get(row, "")
        entry = added.get(row)
        if row not in by_id:
            text, kind = f"[PAD{row}]", TokenType.UNUSED
        elif pieces and text == unknown:
            kind = TokenType.UNKNOWN
        elif entry is not None:
            kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
            text = _RESPELLED.get(text, text) if entry["single_word"] else text
        elif pieces and text in _BYTES:
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(kind)
    special = _special(by_id, settings, stops, rows)
    template = _template(folder, made, settings)
    if not pieces:
        pre = _words(folder, document.get("pre_tokenizer"))
        return Vocabulary("gpt2", pre, tokens, types, None, [" ".join(m) for m in merges], special, template)
    scores = _scores(tokens, types, merges)
    if template is not None:
        for text, spelled in _RESPELLED.items():
            template = template.replace(f"[gMASK]{text}", f"[gMASK]{spelled}")
    return Vocabulary("llama", "chatglm-spm", tokens, types, scores, None, special, template)


def _scores(
    tokens: Sequence[str], types: Sequence[TokenType], merges: Sequence[Sequence[str]]
) -> list[float]:
    """Scores that give pieces the order in which the merges make them; others come last, and nothing makes them."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    last = len(order)
    return [
        -float(order.get(text, last)) if kind is TokenType.NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _words(folder: Path, pre_tokenizer: Json | None) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text."""
    steps = pre_tokenizer or {}
    parts = steps.get("pretokenizers", [steps])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"] and parts[0].get("pattern") == {"Regex": WORDS}:
        # Its name for GLM-4, chatglm-bpe, cuts in the same way but merges words that are tokens of their own;
        # tiktoken does not, and neither does llama-bpe.
        return "llama-bpe"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    raise SourceError(
        f"{folder / 'tokenizer.json'} cuts text into words ({kinds}) in a way that llama.cpp has no name for; "
        "GGUF can hold ChatGLM2's, ChatGLM3's and GLM-4's tokenizers."
    )


def _special(
    by_id: Mapping[int, str], settings: Json, stops: tuple[int | None, ...], rows: int
) -> dict[str, int]:
    by_text: dict[Any, int] = {text: row for row, text in by_id.items()}
    found = {"eos": next((row for row in stops if row is not None), None)}
    # Where the next role begins, an answer has ended.
    found |= {"eot": by_text.get("<|user|>"), "eom": by_text.get("<|observation|>")}
    for ours, theirs in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = settings.get(theirs)
        found[ours] = by_text.get(text.get("content") if isinstance(text, dict) else text)
    if found["eos"] is None:
        text = settings.get("eos_token")
        found["eos"] = by_text.get(text.get("content") if isinstance(text, dict) else text)
    return {name: row for name, row in found.items() if row is not None and 0 <= row < rows}


def _template(folder: Path, made: Mapping[str, bytes] | None, settings: Json) -> str | None:
    path = folder / "chat_template.jinja"
    if made is not None and "chat_template.jinja" in made:
        text: object = made["chat_template.jinja"].decode()
    elif path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        text = settings.get("chat_template")
    return text.replace("\\ufdd0", "") if isinstance(text, str) else None
