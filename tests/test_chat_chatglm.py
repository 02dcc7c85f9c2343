"""chat and stream_chat on ChatGLM-6B's own model, small and random but with the real rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers_chat import Script, tokenizer_of
from helpers_tokenizers import golden_tokenizer

from glmquant.errors import UsageError
from glmquant.prompts import prompt_for

chatglm = pytest.importorskip("glmquant.models.chatglm", reason="the model of ChatGLM-6B is not there yet")


@functools.cache
def small_chatglm(context: int = 2048) -> Any:
    torch.manual_seed(0)
    config = chatglm.ChatGLMConfig(
        vocab_size=130528, hidden_size=16, inner_hidden_size=32, num_layers=2, num_attention_heads=2,
        max_sequence_length=context, bos_token_id=130004, eos_token_id=130005, mask_token_id=130000,
        gmask_token_id=130001, pad_token_id=3, position_encoding_2d=True,
    )  # fmt: skip
    return chatglm.ChatGLMForConditionalGeneration(config).eval()


def test_golden_conversations() -> None:
    golden = golden_tokenizer("chatglm-6b")
    for title, expected in golden["conversations"].items():
        script = Script(golden["reply_ids_used"])
        response, history = small_chatglm().chat(
            tokenizer_of("chatglm-6b"),
            expected["query"],
            history=expected["history"],
            logits_processor=[script],
        )
        assert script.prompt == expected["input_ids"], title
        assert response == expected["response"], title
        assert [list(turn) for turn in history] == expected["history_after"], title


def test_equals_the_model_without_a_cache() -> None:
    """Prefix mask and two rows of positions, all the way through generate."""
    model, tokenizer = small_chatglm(), tokenizer_of("chatglm-6b")
    prompt = prompt_for(tokenizer)
    ids = torch.tensor([prompt.ids("介绍一下清华大学", [("你好", "你好！")])])
    for _ in range(12):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=-1)
    history = [("你好", "你好！")]
    expected = prompt.decode(ids[0, -12:].tolist()).rstrip("\ufffd")
    greedy = {"do_sample": False, "max_new_tokens": 12}
    answer = model.chat(tokenizer, "介绍一下清华大学", history, **greedy)
    assert answer == prompt.reply(expected, "介绍一下清华大学", history)
    *_, last = model.stream_chat(tokenizer, "介绍一下清华大学", history, **greedy)
    assert last == answer


def test_the_tokenizer_encodes_for_the_model() -> None:
    """A padded batch goes into the model as it is, THUDM's mask and positions included."""
    model, tokenizer = small_chatglm(), tokenizer_of("chatglm-6b")
    texts = ["你好", "What is the capital of France?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
        for row, text in zip(together, texts, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(row[-len(alone) :], alone, rtol=0, atol=1e-4)


def test_a_prompt_longer_than_the_context() -> None:
    model, tokenizer = small_chatglm(64), tokenizer_of("chatglm-6b")
    turns = [("问题" * 10, "答案" * 10)] * 9
    with pytest.raises(UsageError, match=r"64 is the limit.*truncate=True"):
        model.chat(tokenizer, "你好", turns)
    assert len(model.chat(tokenizer, "你好", turns, truncate=True, do_sample=False)[1]) == 10
