"""The vocabulary and chat template that go into a GGUF file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers_tokenizers import (
    Case,
    configure,
    golden_tokenizer,
    original_folder,
    pieces_of,
    published,
    snippets,
    train,
    write_ranks,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmquant.errors import SourceError
from glmquant.tokenizers.glm4 import byte_alphabet
from glmquant.tokenizers.llama_cpp import TokenType, Vocabulary, vocabulary


def joined(found: Vocabulary, text: str) -> list[int]:
    """How llama.cpp tokenizes with a ``llama`` vocabulary: the neighbours with the best score are joined, again and
    again, the leftmost first; what is no token then becomes its bytes.
    """
    rows = {token: row for row, token in enumerate(found.tokens) if found.types[row] is TokenType.NORMAL}
    bytes_ = {token: row for row, token in enumerate(found.tokens) if found.types[row] is TokenType.BYTE}
    assert found.scores is not None
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-found.scores[rows[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in rows
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [rows[symbol]] if symbol in rows else [bytes_[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.fixture
def chatglm3(tmp_path: Path) -> Path:
    configure(train(tmp_path / "source"), name_or_path="THUDM/chatglm3-6b")
    (tmp_path / "source/config.json").write_text(json.dumps({"model_type": "chatglm", "seq_length": 256}))
    return tmp_path / "source"


def test_a_sentencepiece_vocabulary(chatglm3: Path) -> None:
    found = vocabulary(chatglm3, 400, {"eos_token_id": 2})
    assert found is not None
    pieces = pieces_of(Case("tiny", chatglm3, chatglm3, {}, None))  # type: ignore[arg-type]
    size = pieces.get_piece_size()
    assert (found.model, found.pre, len(found.tokens)) == ("llama", "chatglm-spm", 400)
    assert found.types[:3] == [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.CONTROL]
    assert found.tokens[size : size + 9] == [
        "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    ]  # fmt: skip
    assert set(found.types[size : size + 9]) == {TokenType.CONTROL}
    assert set(found.types[size + 9 :]) == {TokenType.UNUSED}
    assert found.special == {"eos": 2, "eot": size + 6, "eom": size + 8, "unknown": 0, "padding": 0}
    words = [pieces.id_to_piece(i).replace("▁", " ") for i in range(259, size)]
    for text in snippets(11, 200, words):
        if text and "\x00" not in text and "▁" not in text:
            assert joined(found, text) == pieces.encode(text), repr(text)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_the_published_sentencepiece_vocabularies(name: str) -> None:
    found = vocabulary(original_folder(name), 65024, {"eos_token_id": 2})
    assert found is not None
    for expected in golden_tokenizer(name)["strings"]:
        if expected["text"]:
            assert joined(found, expected["text"]) == expected["ids"], expected["text"]


def test_a_native_folder_gives_the_same_vocabulary_as_the_original() -> None:
    for name, rows in (("chatglm3-6b", 65024), ("glm-4-9b-chat", 151552)):
        case = published(name)
        config = {"eos_token_id": 2}
        ours, theirs = (vocabulary(folder, rows, config) for folder in (case.folder, case.source))
        assert ours is not None
        assert ours == theirs


def rendered(template: str, **values: Any) -> str:
    """As llama.cpp does it, and transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(add_generation_prompt=True, **values)


def test_the_chat_template_spells_what_the_vocabulary_has(chatglm3: Path) -> None:
    found = vocabulary(chatglm3, 400, {"eos_token_id": 2})
    assert found is not None
    assert found.template is not None
    text = rendered(found.template, messages=[{"role": "user", "content": "a sophisticated 你好"}])
    assert text == "[gMASK]<sop><|user|>\n a sophisticated 你好<|assistant|>"


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    configure(tmp_path, tokenizer_class="ChatGLM4Tokenizer", chat_template="x")
    found = vocabulary(tmp_path, 300, {"eos_token_id": [270, 271]})
    assert found is not None
    # llama.cpp's chatglm-bpe would split words that are tokens and that no merges lead to
    assert (found.model, found.pre, found.scores) == ("gpt2", "llama-bpe", None)
    alphabet = byte_alphabet()
    assert found.tokens[:256] == [alphabet[i] for i in range(256)]
    assert found.merges is not None
    assert found.merges[0] == "t h"
    assert (found.special["eos"], found.template) == (270, "x")


def byte_level(folder: Path, pre_tokenizer: Any) -> Path:
    folder.mkdir()
    document = {
        "added_tokens": [{"id": 2, "content": "<e>", "special": True, "single_word": False}],
        "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        (
            {"pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
            "smollm",
        ),
    ],
    ids=["gpt-2", "smollm"],
)  # fmt: skip
def test_how_text_is_cut_has_a_name(tmp_path: Path, pre_tokenizer: Any, name: str) -> None:
    found = vocabulary(byte_level(tmp_path / "x", pre_tokenizer), 5, {})
    assert found is not None
    assert (found.pre, found.merges, found.tokens) == (name, ["a b"], ["a", "b", "<e>", "ab", "[PAD4]"])


def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no name for"):
        vocabulary(byte_level(tmp_path / "x", {"type": "Metaspace"}), 5, {})
    with pytest.raises(SourceError, match="has 4 tokens, the embedding 3 rows"):
        vocabulary(byte_level(tmp_path / "y", {"type": "ByteLevel"}), 3, {})
    assert vocabulary(tmp_path, 5, {}) is None
