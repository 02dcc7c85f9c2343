"""Fast tokenizers of small vocabularies made on the spot, damaged ones, and which tokenizer a folder has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from helpers_tokenizers import Case, configure, make_case, pieces_of, snippets, train, write_ranks

from glmquant.errors import SourceError
from glmquant.tokenizers import fast_tokenizer_files, kind_of
from glmquant.tokenizers.glm4 import WORDS, read_ranks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("tiny")
    configure(train(root / "source"), name_or_path="THUDM/chatglm3-6b")
    (root / "source/config.json").write_text(json.dumps({"model_type": "chatglm", "seq_length": 256}))
    return make_case("tiny", root / "source", root / "out")


def test_tiny_sentencepiece(tiny: Case) -> None:
    pieces = pieces_of(tiny)
    size = pieces.get_piece_size()
    words = [pieces.id_to_piece(i).replace("▁", " ") for i in range(259, size)]
    for text in snippets(5, 300, words):
        assert tiny.plain(text) == pieces.encode(text), repr(text)
    assert tiny.tokenizer("again")["input_ids"] == [size + 1, size + 3, *pieces.encode("again")]
    assert tiny.tokenizer.model_max_length == 256
    ids = tiny.chat([{"role": "user", "content": "<|user|> sop 你好"}])
    content = [*pieces.encode("\n"), *pieces.encode("<|user|> sop 你好")]
    assert ids == [size + 1, size + 3, size + 6, *content, size + 7]


def test_line_breaks_of_an_unfinished_answer(tiny: Case) -> None:
    pieces = pieces_of(tiny)
    ids = pieces.encode("dog\n\n👋")
    assert tiny.tokenizer.decode(ids) == "dog\n\n👋"
    assert tiny.tokenizer.decode(ids[:-1]).startswith("dog\n\n\ufffd")


def test_tiny_tiktoken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_ranks(source)
    configure(source, tokenizer_class="ChatGLM4Tokenizer", model_max_length=64, chat_template=None)
    case = make_case("glm4", source, tmp_path / "out")
    assert set(case.files) == {"tokenizer.json", "tokenizer_config.json"}
    ranks = read_ranks(source / "tokenizer.model")
    reference = tiktoken.Encoding("tiny", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in snippets(6, 300, ["the", " then", "你好", "  "]):
        assert case.plain(text) == reference.encode_ordinary(text), repr(text)
    size = len(ranks)
    assert case.tokenizer("then")["input_ids"] == [size + 2, size + 4, ranks[b"then"]]
    assert case.tokenizer.pad_token_id == case.tokenizer.eos_token_id == size
    assert case.tokenizer.model_max_length == 64


def test_tokens_that_a_fine_tune_added_are_kept(tiny: Case, tmp_path: Path) -> None:
    size = pieces_of(tiny).get_piece_size()
    shutil.copy(tiny.source / "tokenizer.model", tmp_path)

    def record(entries: dict[int, str]) -> None:
        decoder = {str(row): {"content": text, "special": True} for row, text in entries.items()}
        configure(tmp_path, name_or_path="chatglm3", added_tokens_decoder=decoder)

    record({size + 1: "[gMASK]", size + 9: "<|mine|>"})
    case = make_case("added", tmp_path, tmp_path / "out")
    assert case.ids("again<|mine|>")[-1] == size + 9
    for entries, message in (
        ({size + 1: "[oops]"}, r"gives id \d+ to '\[oops\]'"),
        ({size + 12: "<|far|>"}, "skips ids"),
        ({size + 9: "sop"}, "two ids to one token"),
    ):
        record(entries)
        with pytest.raises(SourceError, match=message):
            fast_tokenizer_files(tmp_path)
    configure(tmp_path, added_tokens_decoder={"one": "two"})
    with pytest.raises(SourceError, match="malformed"):
        fast_tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n", "Git LFS pointer"),
        (b"hello", "damaged, or is not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n%%%% 2\n", "line 3 is not a new token"),
        (b"IQ== 0\nIg== 2\n", "line 2 is not a new token"),
        (b"IQ== 0\nIQ== 1\n", "line 2 is not a new token"),
        (b"IQ== 0\nIg== 1\n", "single bytes"),
    ],
)
def test_damaged_vocabulary(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    configure(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        fast_tokenizer_files(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_truncated_vocabulary(tiny: Case, tmp_path: Path, part: float) -> None:
    data = (tiny.source / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: int(len(data) * part)])
    configure(tmp_path)
    with pytest.raises(SourceError, match="download the file again"):
        fast_tokenizer_files(tmp_path)


def test_another_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    for options in (
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"byte_fallback": False, "vocab_size": 120},
    ):
        configure(train(tmp_path, **options))
        with pytest.raises(SourceError, match="not of the kind"):
            fast_tokenizer_files(tmp_path)


def test_unknown_pad_token(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    configure(tmp_path, tokenizer_class="ChatGLM4Tokenizer", pad_token={"content": "<pad>"})
    with pytest.raises(SourceError, match=r"pad_token in .* is '<pad>'"):
        fast_tokenizer_files(tmp_path)


TOKENIZER = "tokenizer_config.json"
SLOW = {"tokenizer_class": "ChatGLMTokenizer"}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({TOKENIZER: {**SLOW, "name_or_path": "THUDM/chatglm2-6b"}}, "chatglm2"),
        ({TOKENIZER: {**SLOW, "name_or_path": "THUDM/chatglm3-6b"}}, "chatglm3"),
        ({TOKENIZER: SLOW, "config.json": {"_name_or_path": "/data/chatglm2-6b-32k"}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"_name_or_path": "THUDM/codegeex2-6b"}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 32768}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 32768, "rope_ratio": 50}}, "chatglm3"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 8192}}, "chatglm3"),
        ({TOKENIZER: SLOW}, "chatglm3"),
        ({"config.json": {"model_type": "chatglm", "seq_length": 32768}}, "chatglm2"),
        (
            {
                TOKENIZER: {**SLOW, "name_or_path": "chatglm3-like"},
                "tokenization_chatglm.py": "tokens = ['[MASK]', '[gMASK]', 'sop']",
            },
            "chatglm2",
        ),
        (
            {
                TOKENIZER: {**SLOW, "name_or_path": "from-chatglm2"},
                "modeling_chatglm.py": "stop = '<|user|>'; raise SystemExit",
            },
            "chatglm3",
        ),
        ({TOKENIZER: {**SLOW, "chat_template": "[gMASK]sop<|user|>"}}, "chatglm3"),
        ({TOKENIZER: {**SLOW, "added_tokens_decoder": {"64795": {"content": "<|user|>"}}}}, "chatglm3"),
        ({TOKENIZER: {"tokenizer_class": "ChatGLM4Tokenizer"}}, "glm4"),
        ({TOKENIZER: {"tokenizer_class": "LlamaTokenizer"}}, None),
        ({"config.json": {"model_type": "llama"}}, None),
        ({TOKENIZER: SLOW, "tokenizer.json": {}}, None),
    ],
)
def test_kind(tmp_path: Path, files: dict[str, Any], kind: str | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert kind_of(tmp_path) == kind


def test_other_folders_have_no_kind(tmp_path: Path) -> None:
    assert fast_tokenizer_files(tmp_path) is None
    (tmp_path / "ice_text.model").write_bytes(b"\x0a\x0e")  # ChatGLM-6B
    configure(tmp_path)
    assert fast_tokenizer_files(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert kind_of(tmp_path) == "glm4"  # by its content, whatever the class is called
    (tmp_path / TOKENIZER).write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        fast_tokenizer_files(tmp_path)
