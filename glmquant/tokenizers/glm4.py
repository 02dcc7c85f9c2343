"""GLM-4: a tiktoken vocabulary as a byte-level byte-pair model.

``tokenizer.model`` has a line for each token: its bytes in base64 and its rank, which is also its
id. tiktoken joins, again and again, the two neighbours whose bytes together have the lowest rank;
so the merges are every way to cut every token in two tokens, lowest rank first. A word that is a
token itself is taken whole, also where merging would not get there (``ignore_merges``).

From the published tokenizer: the pattern that cuts text into words, the special tokens behind the
vocabulary, ``[gMASK]<sop>`` in front of a text, and the chat template. Behind a pair of texts the
published code wants a token ``<eos>`` that does not exist; here it is ``<|endoftext|>``.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from ..errors import SourceError
from .common import (
    Json,
    added_tokens,
    context_length,
    optional_json,
    read_vocabulary,
    tokenizer_config,
    tokenizer_json,
)

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
TOKENS = (
    END,
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
_BYTES = 256


def glm4_files(folder: Path) -> dict[str, bytes]:
    """Make the fast tokenizer of a GLM-4 folder, by file name."""
    ranks = read_ranks(folder / "tokenizer.model")
    config_path = folder / "tokenizer_config.json"
    config = optional_json(config_path)
    added = added_tokens(TOKENS, len(ranks), config, config_path)
    by_text = {token.text: token for token in added}
    named = {key: _spelled(config.get(key)) or END for key in ("eos_token", "pad_token")}
    for key, text in named.items():
        if text not in by_text:
            raise SourceError(f"{key} in {config_path} is {text!r}, which is no token of GLM-4's.")
    words = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    result = {
        "tokenizer.json": tokenizer_json(
            added=added,
            prefix=(by_text["[gMASK]"], by_text["<sop>"]),
            closing=by_text[END],
            normalizer=None,
            pre_tokenizer={"type": "Sequence", "pretokenizers": [words, _byte_level()]},
            decoder=_byte_level(),
            model=_model(ranks),
        ),
    }
    template = config.get("chat_template")
    more = {"model_max_length": context_length(folder, config)}
    if not isinstance(template, str):
        more["chat_template"] = template  # several, by name, or none
    elif not (folder / "chat_template.jinja").exists():
        # Where the source has the file, it is newer than the entry and is carried along.
        result["chat_template.jinja"] = template.encode()
    result["tokenizer_config.json"] = tokenizer_config(added=added, named=named, more=more)
    return dict(sorted(result.items()))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken file: the bytes of each token and its rank, in the order of the ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_vocabulary(path).splitlines()):
        try:
            token, rank = line.split()
            value = base64.b64decode(token, validate=True)
            valid = int(rank) == number and value not in ranks
        except (ValueError, binascii.Error):
            valid = False
        if not valid:
            raise SourceError(
                f"{path} is damaged, or is not a tiktoken vocabulary: line {number + 1} is not "
                f"a new token in base64 with the rank {number}; download the file again."
            )
        ranks[value] = number
    if sum(len(value) == 1 for value in ranks) != _BYTES:
        raise SourceError(f"{path} lacks some of the {_BYTES} single bytes; download it again.")
    return ranks


def _spelled(token: object) -> str | None:
    # Configurations have a token as its text or as an object with its text.
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _byte_level() -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def _model(ranks: dict[bytes, int]) -> Json:
    alphabet = byte_alphabet()
    spelled = {value: "".join([alphabet[byte] for byte in value]) for value in ranks}
    merges = []
    for value in ranks:  # lowest rank first, and so the merges
        cuts = []
        for cut in range(1, len(value)):
            left, right = value[:cut], value[cut:]
            if left in ranks and right in ranks:
                cuts.append((ranks[left], ranks[right], left, right))
        merges += [[spelled[left], spelled[right]] for *_, left, right in sorted(cuts)]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {spelled[value]: rank for value, rank in ranks.items()},
        "merges": merges,
    }


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary.

    GPT-2's rule: printable Latin-1 characters stand for themselves; the others, in order, become
    those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(_BYTES)]
