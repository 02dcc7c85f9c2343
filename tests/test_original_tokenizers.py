"""THUDM's tokenizers as classes of our own: equal to the published code in everything that was recorded of it."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_tokenizers import golden_tokenizer, messages_of, original_folder, require_published

import glmquant
from glmquant.errors import SourceError, UsageError
from glmquant.tokenizers import (
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLM4Tokenizer,
    ChatGLMTokenizer,
    kind_of,
)

CLASSES = {
    "chatglm-6b": ChatGLMTokenizer,
    "chatglm2-6b": ChatGLM2Tokenizer,
    "chatglm3-6b": ChatGLM3Tokenizer,
    "glm-4-9b-chat": ChatGLM4Tokenizer,
}
_loaded: dict[str, Any] = {}


def load(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = glmquant.load_tokenizer(original_folder(name))
    return _loaded[name]


@pytest.fixture(params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    require_published(request.param)
    return request.param


# --- against the golden data ---


def test_class(name: str) -> None:
    assert type(load(name)) is CLASSES[name]


def test_golden_strings(name: str) -> None:
    tokenizer, strings = load(name), golden_tokenizer(name)["strings"]
    assert len(strings) == 68
    for expected in strings:
        text = expected["text"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected["ids"], text
        assert tokenizer(text)["input_ids"] == expected["ids_with_special"], text
        assert tokenizer.encode(text) == expected["ids_with_special"], text
        if "tokens" in expected:
            assert tokenizer.tokenize(text) == expected["tokens"], text
        if name == "glm-4-9b-chat":
            plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            assert plain["input_ids"] == expected["raw_ids"], text


def test_golden_decoding(name: str) -> None:
    tokenizer = load(name)
    for expected in golden_tokenizer(name)["strings"]:
        assert tokenizer.decode(expected["ids"]) == expected["decoded"], expected["text"]
        ids = expected["ids" if name in ("glm-4-9b-chat", "chatglm-6b") else "ids_with_special"]
        skipped = tokenizer.decode(ids, skip_special_tokens=True)
        assert skipped == expected["decoded_skip_special"], expected["text"]
        assert tokenizer.decode(torch.tensor(expected["ids"])) == expected["decoded"]
    both = [expected["ids"] for expected in golden_tokenizer(name)["strings"][2:4]]
    assert tokenizer.batch_decode(both) == [tokenizer.decode(ids) for ids in both]


def test_golden_role_tokens() -> None:
    folder = original_folder("chatglm3-6b")
    tokenizer = ChatGLM3Tokenizer.from_pretrained(folder, encode_special_tokens=True)
    for expected in golden_tokenizer("chatglm3-6b")["strings_encode_special_tokens"]:
        assert tokenizer.encode(expected["text"], add_special_tokens=False) == expected["ids"]
        assert tokenizer.tokenize(expected["text"]) == expected["tokens"]
    for expected in golden_tokenizer("chatglm3-6b")["strings"]:
        ids = expected["ids_with_special"]
        assert tokenizer.decode(ids) == expected["decoded_skip_special"]


def test_golden_special_ids_and_attributes(name: str) -> None:
    tokenizer, golden = load(name), golden_tokenizer(name)
    for text, row in golden["special_ids"].items():
        if text in ("<bos>", "<eos>", "<pad>") and name != "chatglm-6b":
            assert tokenizer.get_command(text) == row
        else:
            assert tokenizer.convert_tokens_to_ids(text) == row, text
            assert tokenizer.convert_ids_to_tokens(row) == ("" if name == "chatglm2-6b" else text)
            assert text in tokenizer.get_vocab()
    for key, value in golden["attributes"].items():
        assert getattr(tokenizer, key) == value, key
    assert len(tokenizer) == golden.get("len", golden["attributes"]["vocab_size"])
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def nested(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, torch.Tensor) else np.array(values).tolist()


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_golden_padded_batch(name: str, tensors: str | None) -> None:
    tokenizer, expected = load(name), golden_tokenizer(name)["padded_batch"]
    batch = tokenizer(expected["texts"], padding=True, return_tensors=tensors)
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}
    mask = expected.get("attention_mask", expected.get("attention_mask_true_means_masked"))
    for key, value in (("attention_mask", mask), ("position_ids", expected["position_ids"])):
        assert nested(batch[key]) == value, key
    assert nested(batch["input_ids"]) == expected["input_ids"]
    if tensors and name == "chatglm-6b":
        assert batch["attention_mask"].dtype == torch.bool
        assert batch["position_ids"].dtype == torch.int64
    later = tokenizer.pad([tokenizer(text) for text in expected["texts"]], padding=True)
    assert nested(later["position_ids"]) == expected["position_ids"]


def test_golden_pair(name: str) -> None:
    tokenizer, pair = load(name), golden_tokenizer(name).get("pair_encoding")
    if pair:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
    ids = tokenizer("a", "b", add_special_tokens=False)["input_ids"]
    both = tokenizer("a", "b", return_special_tokens_mask=True)
    plain = [
        row
        for row, special in zip(both["input_ids"], both["special_tokens_mask"], strict=True)
        if not special
    ]
    assert plain == ids
    assert (
        tokenizer.get_special_tokens_mask(both["input_ids"], already_has_special_tokens=True)
        == (both["special_tokens_mask"])
    )


# --- beyond the golden data ---


def test_an_unpadded_encoding(name: str) -> None:
    encoding = load(name)("你好")
    if name == "chatglm-6b":
        assert set(encoding) == {"input_ids"}
    else:
        assert encoding["position_ids"] == list(range(len(encoding["input_ids"])))
        assert encoding["attention_mask"] == [1] * len(encoding["input_ids"])


def test_padding_to_a_length_and_truncation(name: str) -> None:
    tokenizer = load(name)
    batch = tokenizer(
        ["你好", "a b c d e f g"], padding="max_length", max_length=9, truncation=True, return_tensors="pt"
    )
    assert batch["input_ids"].shape == (2, 9)
    assert batch["position_ids"].shape[-1] == batch["attention_mask"].shape[-1] == 9
    assert batch["position_ids"][0].flatten()[0] == 0
    with pytest.raises(UsageError, match="left"):
        tokenizer(["你好", "a b c d e f g"], padding=True, padding_side="right")


def test_mask_marks_before_gmask() -> None:
    tokenizer = load("chatglm-6b")
    ids = [10, tokenizer.mask_token_id, 11, tokenizer.gmask_token_id, tokenizer.bos_token_id, 12]
    hidden, positions = tokenizer.mask_and_positions(ids)
    assert positions.tolist() == [[0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]]
    assert hidden[0, :, 4].tolist() == [True] * 4 + [False, False]
    assert hidden[0, :, 5].tolist() == [True] * 5 + [False]
    assert not hidden[0, :, :4].any()


def test_ids_without_meaning_decode_to_nothing(name: str) -> None:
    """The head has more rows than the vocabulary, so such ids are sampled; the published code raises IndexError."""
    tokenizer = load(name)
    rows = {"chatglm-6b": 130528, "glm-4-9b-chat": 151552}.get(name, 65024)
    ids = tokenizer.encode("你好", add_special_tokens=False)
    for strange in (len(tokenizer), rows - 1, rows, 10**6, -1):
        assert tokenizer.decode([*ids, strange]) == "你好"
        assert tokenizer.decode(strange) == ""
    assert tokenizer.decode([]) == ""


def test_chatglm2_leaves_special_tokens_out() -> None:
    tokenizer = load("chatglm2-6b")
    assert tokenizer.decode(tokenizer("你好")["input_ids"]) == "你好"
    with pytest.raises(UsageError, match=r"<\|user\|>"):
        tokenizer.get_command("<|user|>")
    assert load("chatglm3-6b").get_command("<|user|>") == 64795


def test_special_text_by_option() -> None:
    """Plain text never becomes a special token in ChatGLM-6B, 2 and 3; ChatGLM-6B's can be asked to."""
    tokenizer = load("chatglm-6b")
    assert tokenizer.mask_token_id not in tokenizer("[MASK]")["input_ids"]
    assert tokenizer.mask_token_id in tokenizer("[MASK]", split_special_tokens=False)["input_ids"]


def test_saving_and_loading_again(name: str, tmp_path: Path) -> None:
    tokenizer = load(name)
    folder = original_folder(name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer.save_pretrained(tmp_path)
    assert kind_of(tmp_path) == tokenizer.kind
    again = glmquant.load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert not [path for path in tmp_path.glob("*.json") if "auto_map" in path.read_text()]
    for expected in golden_tokenizer(name)["strings"]:
        assert again(expected["text"])["input_ids"] == expected["ids_with_special"]
        assert again.decode(expected["ids"]) == expected["decoded"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for key, value in golden_tokenizer(name)["attributes"].items():
        assert getattr(again, key) == value, key


def test_a_copy_in_another_process(name: str) -> None:
    tokenizer = load(name)
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied("你好 hello")["input_ids"] == tokenizer("你好 hello")["input_ids"]


def test_glm4_chat_template() -> None:
    tokenizer = load("glm-4-9b-chat")
    for name, expected in golden_tokenizer("glm-4-9b-chat")["conversations"].items():
        text = tokenizer.apply_chat_template(expected["messages"], tokenize=False, add_generation_prompt=True)
        assert text == expected["prompt"], name
        ids = tokenizer.apply_chat_template(
            expected["messages"], add_generation_prompt=True, return_dict=False
        )
        assert ids == expected["input_ids"], name


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_chat_template(name: str) -> None:
    """The ids of chat(), whatever template the folder carries, and for text that spells special tokens too."""
    tokenizer, conversations = load(name), golden_tokenizer(name)["conversations"]
    messages = {title: messages_of(name, expected) for title, expected in conversations.items()}
    for title, expected in conversations.items():
        encoding = tokenizer.apply_chat_template(messages[title], add_generation_prompt=True)
        assert encoding["input_ids"] == expected["input_ids"], title
        assert encoding["attention_mask"] == [1] * len(expected["input_ids"])
    both = [messages["single_zh"], messages["two_turns"]]
    batch = tokenizer.apply_chat_template(both, add_generation_prompt=True, padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist() == conversations["two_turns"]["input_ids"]
    assert batch["attention_mask"].sum(-1).tolist()[0] == len(conversations["single_zh"]["input_ids"])
    ids = tokenizer.apply_chat_template(
        both[0], return_dict=False, return_tensors="pt", add_generation_prompt=True
    )
    assert ids.tolist() == [conversations["single_zh"]["input_ids"]]
    text = tokenizer.apply_chat_template(messages["special_lookalike"], tokenize=False)
    assert "please print <|user|> and [gMASK] <sop>" in text


def test_no_network_and_no_files(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert CLASSES[name].from_pretrained(original_folder(name))("hi")["input_ids"]
    assert not list(tmp_path.iterdir())


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original_folder("chatglm3-6b"), folder)
    (folder / "tokenization_chatglm.py").write_text(
        "# <|user|>\nraise SystemExit('code from the folder ran')"
    )
    script = f"import glmquant; print(glmquant.load_tokenizer({str(folder)!r})('你好')['input_ids'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[64790, 64792, 36474, 54591]", done.stderr


def test_the_published_class_name_serves_all_sentencepiece_folders() -> None:
    """Folders of ChatGLM2 and 3 say tokenizer_class ChatGLMTokenizer."""
    for model in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b"):
        assert type(ChatGLMTokenizer.from_pretrained(original_folder(model))) is CLASSES[model]


def change(folder: Path, file: str, **entries: Any) -> None:
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("missing", ["ice_text.model", "tokenizer.model"])
def test_a_missing_vocabulary(missing: str, tmp_path: Path) -> None:
    change(tmp_path, "tokenizer_config.json", tokenizer_class="ChatGLMTokenizer")
    change(tmp_path, "config.json", model_type="chatglm")
    with pytest.raises(SourceError, match=missing):
        glmquant.load_tokenizer(tmp_path)
    with pytest.raises(SourceError, match="tokenizer"):
        ChatGLM2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        glmquant.load_tokenizer(tmp_path / "nowhere")


def test_another_tokenizer_class(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    change(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(SourceError, match="LlamaTokenizer"):
        glmquant.load_tokenizer(tmp_path)


def swap(tmp_path: Path, model: str, vocabulary_of: str, rename: Sequence[str]) -> Path:
    folder = tmp_path / "swapped"
    shutil.copytree(original_folder(model), folder)
    (folder / rename[0]).unlink(missing_ok=True)
    shutil.copy(original_folder(vocabulary_of) / rename[1], folder / rename[0])
    return folder


def test_vocabularies_of_other_models(tmp_path: Path) -> None:
    folder = swap(tmp_path, "chatglm-6b", "chatglm2-6b", ("ice_text.model", "tokenizer.model"))
    with pytest.raises(SourceError, match=r"not ChatGLM-6B's: it lacks \[MASK\]"):
        glmquant.load_tokenizer(folder)
    shutil.rmtree(folder)
    folder = swap(tmp_path, "chatglm3-6b", "chatglm-6b", ("tokenizer.model", "ice_text.model"))
    with pytest.raises(SourceError, match="not the one of ChatGLM2 and ChatGLM3"):
        glmquant.load_tokenizer(folder)
    shutil.rmtree(folder)
    folder = swap(tmp_path, "glm-4-9b-chat", "chatglm2-6b", ("tokenizer.model", "tokenizer.model"))
    with pytest.raises(SourceError, match="not a tiktoken vocabulary"):
        glmquant.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (
            "chatglm2-6b",
            {"padded_vocab_size": 64000},
            "64794 tokens, but config.json gives the model only 64000",
        ),
        ("chatglm-6b", {"vocab_size": 256}, "only 256 rows"),
    ],
)
def test_vocabularies_that_do_not_fit_the_model(
    model: str, rows: dict[str, int], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original_folder(model), folder)
    change(folder, "config.json", **rows)
    with pytest.raises(SourceError, match=message):
        glmquant.load_tokenizer(folder)


def test_the_first_release_of_chatglm_6b(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(original_folder("chatglm-6b"), folder)
    change(folder, "tokenizer_config.json", num_image_tokens=20000)
    with pytest.raises(SourceError, match="first release"):
        glmquant.load_tokenizer(folder)
