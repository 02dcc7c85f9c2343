"""The original tokenizers on small vocabularies made on the spot: these tests run everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import Script
from helpers_tokenizers import configure, make_case, snippets, train, write_ranks
from transformers import GlmConfig, GlmForCausalLM

import glmquant
from glmquant.errors import SourceError
from glmquant.prompts import prompt_for
from glmquant.tokenizers import ChatGLM4Tokenizer, ChatGLMTokenizer

CONTROL = ["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
WORDS = ["the", " then", "你好", "  ", "\n"]


def sentencepiece_folder(folder: Path, model: str) -> Path:
    configure(train(folder), name_or_path=f"THUDM/{model}")
    return folder


def chatglm_folder(folder: Path) -> Path:
    train(
        folder, model_type="unigram", hard_vocab_limit=False, normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True, vocab_size=480, control_symbols=CONTROL,
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))],
    )  # fmt: skip
    (folder / "tokenizer.model").rename(folder / "ice_text.model")
    configure(folder, mask_token="[MASK]", gmask_token="[gMASK]", end_token="</s>", num_image_tokens=0)
    return folder


def glm4_folder(folder: Path) -> Path:
    folder.mkdir()
    write_ranks(folder)
    configure(folder, tokenizer_class="ChatGLM4Tokenizer")
    return folder


@pytest.mark.parametrize("model", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_equal_to_the_fast_tokenizer(model: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    folder = glm4_folder(source) if model == "glm-4-9b-chat" else sentencepiece_folder(source, model)
    case = make_case(model, folder, tmp_path / "fast")
    tokenizer = glmquant.load_tokenizer(folder)
    assert len(tokenizer) == len(case.tokenizer)
    for text in snippets(8, 200, WORDS):
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert plain == case.plain(text), repr(text)
        assert tokenizer.decode(plain) == case.tokenizer.decode(plain), repr(text)
    prompts = prompt_for(tokenizer), prompt_for(case.tokenizer)
    assert prompts[0].kind == prompts[1].kind == tokenizer.kind
    for text in snippets(9, 50, ["<|user|>", "[gMASK]", "sop", "你好"]):
        query = text.replace("\ufdd0", "")
        assert prompts[0].ids(query, []) == prompts[1].ids(query, [])


def test_chatglm(tmp_path: Path) -> None:
    tokenizer = glmquant.load_tokenizer(chatglm_folder(tmp_path / "model"))
    assert type(tokenizer) is ChatGLMTokenizer
    text = "the fox\n\tjumps" + " " * 90 + "over    你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    runs = [token for token in tokenizer.tokenize(" " * 90 + "x") if "blank" in token]
    assert runs == ["<|blank_80|>", "<|blank_10|>"]
    end = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert tokenizer("the")["input_ids"][-2:] == end
    assert set(tokenizer("[gMASK]<sop>", add_special_tokens=False)["input_ids"]).isdisjoint(end)
    batch = tokenizer(["the", "the quick brown fox"], padding=True, return_tensors="pt")
    size = batch["input_ids"].shape[1]
    assert batch["attention_mask"].shape == (2, 1, size, size)
    assert batch["position_ids"].shape == (2, 2, size)
    prompt = prompt_for(tokenizer)
    assert prompt.decode(prompt.ids("你好", [("the", "fox")])) == prompt.text(
        "你好", [("the", "fox")]
    ).replace("：", ":")


@pytest.mark.parametrize("kept", ["ice_text.model", "tokenizer.model"])
def test_a_damaged_vocabulary(kept: str, tmp_path: Path) -> None:
    make: Any = (
        chatglm_folder
        if kept == "ice_text.model"
        else lambda folder: sentencepiece_folder(folder, "chatglm2-6b")
    )
    folder = make(tmp_path / "model")
    data = (folder / kept).read_bytes()
    for content, message in (
        (data[: len(data) // 3], "damaged"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        (folder / kept).write_bytes(content)
        with pytest.raises(SourceError, match=message):
            glmquant.load_tokenizer(folder)


def test_tokens_that_a_fine_tune_added(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "model", "chatglm3-6b")
    size = len(glmquant.load_tokenizer(folder))

    def add(row: int, text: str) -> None:
        decoder = {str(row): {"content": text, "special": True}}
        configure(folder, name_or_path="THUDM/chatglm3-6b", added_tokens_decoder=decoder)

    add(size, "<|mine|>")
    tokenizer = glmquant.load_tokenizer(folder)
    assert tokenizer("the<|mine|>", split_special_tokens=False)["input_ids"][-1] == size
    assert size not in tokenizer("the<|mine|>")["input_ids"]
    assert tokenizer.decode([size]) == "<|mine|>"
    add(size - 1, "<|mine|>")
    with pytest.raises(SourceError, match="gives id"):
        glmquant.load_tokenizer(folder)


def test_a_damaged_fast_tokenizer(tmp_path: Path) -> None:
    case = make_case("fast", sentencepiece_folder(tmp_path / "source", "chatglm3-6b"), tmp_path / "fast")
    assert glmquant.load_tokenizer(case.folder)("the")["input_ids"] == case.tokenizer("the")["input_ids"]
    (case.folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be loaded"):
        glmquant.load_tokenizer(case.folder)


def test_a_vocabulary_that_spells_a_special_token(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_ranks(folder, ["<sop>"])
    configure(folder, tokenizer_class="ChatGLM4Tokenizer")
    with pytest.raises(SourceError, match="special token among its ranks"):
        ChatGLM4Tokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    sentencepiece = train(folder, user_defined_symbols=["sop"])
    configure(sentencepiece, name_or_path="THUDM/chatglm3-6b")
    with pytest.raises(SourceError, match="not the one of ChatGLM2 and ChatGLM3"):
        glmquant.load_tokenizer(folder)


def test_chat(tmp_path: Path) -> None:
    """The whole way, on a model and a vocabulary that are made here."""
    tokenizer = glmquant.load_tokenizer(sentencepiece_folder(tmp_path / "model", "chatglm3-6b"))
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    script = [*prompt_for(tokenizer).plain("\n你好 👋 again"), tokenizer.get_command("<|user|>")]
    answer, history = glmquant.chat(model, tokenizer, "the fox", logits_processor=[Script(script)])
    assert answer == "你好 👋 again"
    *parts, last = glmquant.stream_chat(model, tokenizer, "the fox", logits_processor=[Script(script)])
    assert last == (answer, history)
    assert len(parts) > 3
    assert not any("\ufffd" in text for text, _ in parts)
