"""Methods of THUDM's models and tokenizers that people call beside `chat`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_models import golden
from helpers_tokenizers import golden_tokenizer, original_folder, require_published

import glmquant
from glmquant import UsageError
from glmquant.prompts import prompt_for


def tokenizer_of(name: str) -> Any:
    require_published(name)
    return glmquant.load_tokenizer(original_folder(name))


@pytest.fixture(scope="module", params=["chatglm-6b/tiny-3l", "chatglm2-6b/tiny/bin-fp16"])
def model(request: pytest.FixtureRequest) -> Any:
    return glmquant.load(golden(request.param), device="cpu", dtype="float32")


def test_the_prompt_of_chatglm2_as_text() -> None:
    tokenizer, shown = tokenizer_of("chatglm2-6b"), 0
    for case in golden_tokenizer("chatglm2-6b")["conversations"].values():
        if "prompt" in case:
            assert tokenizer.build_prompt(case["query"], case["history"]) == case["prompt"]
            shown += 1
    assert shown
    with pytest.raises(UsageError, match="build_chat_input"):
        tokenizer_of("chatglm3-6b").build_prompt("x")


def test_the_chat_input_of_chatglm3() -> None:
    tokenizer = tokenizer_of("chatglm3-6b")
    for title, case in golden_tokenizer("chatglm3-6b")["conversations"].items():
        inputs = tokenizer.build_chat_input(case["query"], case["history"], case.get("role", "user"))
        assert inputs["input_ids"].tolist() == [case["input_ids"]], title
        assert inputs["attention_mask"].tolist() == [[1] * len(case["input_ids"])]


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_a_prompt_is_its_single_messages(name: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = prompt_for(tokenizer)
    ids = prompt.ids("hi", [{"role": "assistant", "metadata": "tool", "content": "x=1"}], "observation")
    messages = [("assistant", "tool", "x=1"), ("observation", "", "hi")]
    built = [row for message in messages for row in tokenizer.build_single_message(*message)]
    assert ids == [*tokenizer.get_prefix_tokens(), *built, tokenizer.convert_tokens_to_ids("<|assistant|>")]
    with pytest.raises(UsageError, match="role 'nobody'"):
        tokenizer.build_single_message("nobody", "", "x")


@pytest.mark.parametrize(
    ("name", "tiny"), [("chatglm-6b", "chatglm-6b/tiny-3l"), ("chatglm2-6b", "chatglm2-6b/tiny/bin-fp16")]
)
def test_inputs_of_a_model(name: str, tiny: str) -> None:
    tokenizer = tokenizer_of(name)
    model = glmquant.load(golden(tiny), device="cpu")
    for title, case in golden_tokenizer(name)["conversations"].items():
        inputs = model.build_inputs(tokenizer, case["query"], history=case["history"])
        assert inputs["input_ids"].tolist() == [case["input_ids"]], title
        assert inputs["input_ids"].device == model.device


def test_responses(model: Any) -> None:
    first = model.config.model_type == "chatglm"
    assert model.process_response(" [[训练时间]]好,的 ") == ("2023年好，的" if first else "2023年好,的")


def test_stream_generate_yields_all_ids_so_far(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, model.config.gmask_token_id, model.config.bos_token_id]]) if (
        model.config.model_type == "chatglm"
    ) else torch.tensor([[5, 6, 7]])  # fmt: skip
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [model.config.vocab_size - 1]}
    steps = list(model.stream_generate(ids, **options))
    assert torch.equal(steps[-1], model.generate(ids, **options))
    for step, shorter in zip(steps[1:], steps, strict=False):
        assert torch.equal(step[:, :-1], shorter)
    assert torch.equal(steps[0][:, :-1], ids)


def test_quantize_takes_what_thudms_takes() -> None:
    load = lambda: glmquant.load(golden("chatglm-6b/tiny-3l"), device="cpu")  # noqa: E731
    options = {"kernel_file": "q.so", "source_code": "x", "compile_parallel_kernel": True, "parallel_num": 2}
    model = load().quantize(bits=4, use_quantization_cache=True, quantize_embeddings=False, **options)
    assert model.quantized_bits == 4
    for wrong, said in (
        ({"quantize_embeddings": True}, "glmquant.convert"),
        ({"kernel_fill": "x"}, "no option kernel_fill"),
    ):
        model = load()
        with pytest.raises(UsageError, match=said):
            model.quantize(4, **wrong)
        assert model.quantized_bits is None
