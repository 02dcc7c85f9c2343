"""ChatGLM2 and ChatGLM3: a SentencePiece vocabulary as a byte-pair model.

SentencePiece joins, again and again, the two neighbours that form the best-scored piece. A list of
merges says the same when it holds every way to make every piece out of two pieces, best piece
first. (Between two ways to make one piece the list has an order, where SentencePiece takes the
leftmost. With the published vocabulary no text was found where that shows.)

From the published tokenizer: text is not normalized; in front of every text, also of one between
two special tokens, a space is imagined (the "dummy prefix"); a character without a piece becomes
its UTF-8 bytes; ids 0 to 2 are ``<unk>`` (also the padding), ``<s>`` and ``</s>``; the special
tokens follow the vocabulary. ``<s>`` is not looked for in text: nothing produces it, and in HTML
it is common.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from ..errors import SourceError
from .common import (
    Json,
    Token,
    added_tokens,
    context_length,
    load_pieces,
    optional_json,
    tokenizer_config,
    tokenizer_json,
)

SPACE = "\u2581"
# The chat templates put this into text that spells a special token; the normalizer removes it.
GUARD = "\ufdd0"

CHATGLM2_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TOKENS = {"chatglm2": CHATGLM2_TOKENS, "chatglm3": CHATGLM2_TOKENS + ROLE_TOKENS}
_FIRST = ["<unk>", "<s>", "</s>"]
_BYTES = 256


def chatglm_files(folder: Path, kind: Literal["chatglm2", "chatglm3"]) -> dict[str, bytes]:
    """Make the fast tokenizer of a ChatGLM2 or ChatGLM3 folder, by file name.

    The chat template is always the one beside this module. Later revisions of ChatGLM3 carry one,
    but it is an approximation: its ids are not those of the published ``chat()``.
    """
    model = _model(folder / "tokenizer.model")
    config_path = folder / "tokenizer_config.json"
    config = optional_json(config_path)
    behind = added_tokens(TOKENS[kind], len(model["vocab"]), config, config_path)
    unknown, end = Token("<unk>", 0), Token("</s>", 2)
    added = [unknown, end, *behind]
    by_text = {token.text: token for token in added}
    return {
        "chat_template.jinja": (files(__package__) / f"{kind}.jinja").read_bytes(),
        "tokenizer.json": tokenizer_json(
            added=added,
            prefix=(by_text["[gMASK]"], by_text["sop"]),
            closing=end,
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    _replace(GUARD, ""),
                    {"type": "Prepend", "prepend": SPACE},
                    _replace(" ", SPACE),
                ],
            },
            pre_tokenizer=None,
            decoder=_decoder(),
            model=model,
        ),
        "tokenizer_config.json": tokenizer_config(
            added=added,
            named={"eos_token": end.text, "pad_token": unknown.text, "unk_token": unknown.text},
            more={"model_max_length": context_length(folder, config)},
        ),
    }


def _decoder() -> Json:
    steps = [
        _replace(SPACE, " "),
        # A run of byte tokens that ends inside a character becomes U+FFFD as a whole; this keeps
        # the line breaks of an unfinished answer.
        _replace("<0x0A>", "\n"),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        # One space for the whole text, not one for each part between special tokens.
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {"type": "Sequence", "decoders": steps}


def _replace(old: str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _model(path: Path) -> Json:
    pieces = load_pieces(path)
    size = int(pieces.get_piece_size())
    vocabulary = {str(pieces.id_to_piece(row)): row for row in range(size)}
    scores = {}
    for piece, row in vocabulary.items():
        reserved = pieces.is_control(row) or pieces.is_unknown(row) or pieces.is_unused(row)
        if not reserved and not pieces.is_byte(row):
            scores[piece] = float(pieces.get_score(row))
    # A byte-pair model scores its pieces 0, -1, -2, ...; in a unigram model they are logarithms.
    pairwise = bool(scores) and all(score.is_integer() for score in scores.values())
    bytewise = sum(map(pieces.is_byte, range(size))) == _BYTES
    if not (pairwise and bytewise and len(vocabulary) == size and list(vocabulary)[:3] == _FIRST):
        raise SourceError(
            f"{path} is a SentencePiece model, but not of the kind that ChatGLM2 and ChatGLM3 have "
            "(byte-pair, with byte pieces); take the file that was published with the model."
        )
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _FIRST[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [[left, right] for *_, left, right in merges],
    }
