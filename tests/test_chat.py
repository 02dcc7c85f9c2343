"""chat: THUDM's method for every generation, with the published prompts, answers and errors that say what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers_chat import ROWS, SOURCES, Script, small_model, tokenizer_of
from helpers_tokenizers import golden_tokenizer

import glmquant
from glmquant.errors import UsageError
from glmquant.models.chat import InvalidScoreLogitsProcessor
from glmquant.prompts import prompt_for

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def ids_of(name: str, source: str, text: str) -> list[int]:
    return prompt_for(tokenizer_of(name, source)).plain(text)


@pytest.mark.parametrize(("name", "source"), SOURCES[:3] + SOURCES[4:6])
def test_golden_conversations(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, golden = small_model(name), tokenizer_of(name, source), golden_tokenizer(name)
    given: dict[str, Any] = {}
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **kwargs: given.update(kwargs) or generate(ids, **kwargs)
    )
    for title, expected in golden["conversations"].items():
        script = Script(golden["reply_ids_used"])
        before = json.dumps(expected["history"])
        role = {"role": expected["role"]} if "role" in expected else {}
        response, history = model.chat(
            tokenizer, expected["query"], history=expected["history"], logits_processor=[script], **role
        )
        assert script.prompt == expected["input_ids"], title
        assert response == expected["response"], title
        assert json.loads(json.dumps(history)) == expected["history_after"], title
        assert json.dumps(expected["history"]) == before
        arguments = expected["gen_kwargs"]
        for key in ("num_beams", "do_sample", "top_p", "temperature"):
            assert given[key] == arguments[key]
        if (
            name != "chatglm3-6b"
        ):  # 8192 there is the context of ChatGLM3-6B; this model has the context of -32K
            assert given["max_new_tokens"] + len(expected["input_ids"]) == arguments["max_length"]
        assert given["eos_token_id"] == arguments.get("eos_token_id", golden["reply_ids_used"][-1:])
        assert [type(each).__name__ for each in given["logits_processor"]][:1] == arguments[
            "logits_processor"
        ]


@pytest.mark.parametrize("source", ["original", "fast"])
def test_golden_conversations_of_glm4(source: str) -> None:
    name = "glm-4-9b-chat"
    answer = [*ids_of(name, source, "\n好的。"), 151336]
    for title, expected in golden_tokenizer(name)["conversations"].items():
        *history, last = expected["messages"]
        script = Script(answer)
        response, after = small_model(name).chat(
            tokenizer_of(name, source), last["content"], history, role=last["role"], logits_processor=[script]
        )
        ids = expected.get("input_ids_built_message_by_message", expected["input_ids"])
        assert script.prompt == ids, title
        assert response == "好的。"
        assert after == [*history, last, {"role": "assistant", "metadata": "", "content": "好的。"}]


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_equals_generate(name: str, source: str) -> None:
    model, tokenizer = small_model(name), tokenizer_of(name, source)
    prompt = prompt_for(tokenizer)
    ids = torch.tensor([prompt.ids("你好", [])])
    # Ids beyond the vocabulary, which random models choose too, have no text.
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=None, max_new_tokens=12, top_p=None,
        temperature=None, eos_token_id=prompt.stop_ids(), pad_token_id=tokenizer.pad_token_id,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    text = prompt.decode(output).rstrip("\ufffd")
    assert glmquant.chat(model, tokenizer, "你好", **GREEDY) == prompt.reply(text, "你好", [])


@pytest.mark.parametrize("name", list(ROWS)[1:])
def test_generate_takes_what_the_tokenizer_gives(name: str) -> None:
    """As GLM-4's model card does it; and a padded batch answers as each of its rows alone."""
    model, tokenizer = small_model(name), tokenizer_of(name)
    texts = ["你好", "What is the capital of France?"]
    options = {"do_sample": False, "max_length": None, "max_new_tokens": 6, "eos_token_id": None}
    batch = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), **options)
    for row, text in zip(batch, texts, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert row[-6:].tolist() == alone[-6:].tolist()


def test_beams_and_repeatable_samples() -> None:
    model, tokenizer = small_model("chatglm3-6b"), tokenizer_of("chatglm3-6b")
    assert model.chat(tokenizer, "你好", num_beams=2, do_sample=False, max_new_tokens=4)[0] is not None
    answers = []
    for _ in range(2):
        torch.manual_seed(5)
        answers.append(model.chat(tokenizer, "你好", max_new_tokens=8))
    assert answers[0] == answers[1]


TOOL = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("source", ["original", "fast"])
@pytest.mark.parametrize(
    ("name", "tools", "call", "stop"),
    [
        ("chatglm3-6b", [TOOL], "get_weather\n ```python\ntool_call(city='北京')\n```", 64797),
        ("glm-4-9b-chat", [{"type": "function", "function": TOOL}], 'get_weather\n{"city": "北京"}', 151338),
    ],
)
def test_function_calling(name: str, tools: list[Any], call: str, stop: int, source: str) -> None:
    """Question, call, observation, answer; every prompt continues what the model itself has written."""
    model, tokenizer = small_model(name), tokenizer_of(name, source)
    system = {"role": "system", "content": "Answer as best as you can.", "tools": tools}
    asked = Script([*ids_of(name, source, call), stop])
    response, history = model.chat(tokenizer, "北京天气怎么样？", history=[system], logits_processor=[asked])
    assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
    assert history[-1]["metadata"] == "get_weather"
    result = json.dumps({"temp": 21})
    end = prompt_for(tokenizer).stop_ids()[1]
    told = Script([*ids_of(name, source, "\n北京 21 度。"), end])
    response, history = model.chat(
        tokenizer, result, history=history, role="observation", logits_processor=[told]
    )
    assert response == "北京 21 度。"
    assert [message["role"] for message in history] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]
    assert told.prompt[: len(asked.prompt)] == asked.prompt
    written = told.prompt[len(asked.prompt) : told.prompt.index(stop, len(asked.prompt))]
    assert prompt_for(tokenizer).decode(written).split() == call.split()


def test_a_tool_call_is_never_run(tmp_path: Any) -> None:
    name, marker = "chatglm3-6b", tmp_path / "ran"
    call = f"get_weather\n ```python\ntool_call(a=open({str(marker)!r}, 'w'))\n```"
    response, _ = small_model(name).chat(
        tokenizer_of(name), "?", [{"role": "system", "content": "", "tools": [TOOL]}],
        logits_processor=[Script([*ids_of(name, "original", call), 64797])],
    )  # fmt: skip
    assert response["name"] == "get_weather"
    assert "open(" in response["content"]
    assert not marker.exists()


# --- limits and mistakes ---


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_longer_than_the_context(name: str) -> None:
    model, tokenizer = small_model(name, context=256), tokenizer_of(name)
    turns: list[Any] = [(f"问题 {i} " + "长" * 20, "答案" * 5) for i in range(20)]
    if name in ("chatglm3-6b", "glm-4-9b-chat"):
        roles = ("user", "assistant")
        turns = [{"role": "system", "content": "短。"}] + [
            {"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)
        ]
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, and 256 is the limit.*truncate=True"):
        model.chat(tokenizer, "最后", history=turns, **GREEDY)
    script = Script([0] * 300)
    _, history = model.chat(
        tokenizer, "最后", turns, truncate=True, logits_processor=[script], do_sample=False
    )
    assert len(script.prompt) <= 256 * 3 // 4
    text = prompt_for(tokenizer).decode(script.prompt)
    assert "最后" in text
    assert "问题 19" in text.replace("▁", " ")
    assert "问题 0" not in text
    assert ("短。" in text) == isinstance(turns[0], dict)
    assert len(history) >= len(turns) + 1  # what is returned is not shortened
    with pytest.raises(UsageError, match="shorten the query"):
        model.chat(tokenizer, "长，" * 300, turns, truncate=True)
    with pytest.raises(UsageError, match="and 3 is the limit"):
        model.chat(tokenizer, "最后", max_length=3)


def test_limits_of_the_answer() -> None:
    model, tokenizer = small_model("chatglm2-6b", context=64), tokenizer_of("chatglm2-6b")
    row = tokenizer.convert_tokens_to_ids("好")
    for options, length in (({}, 64), ({"max_length": 40}, 40), ({"max_length": 20000}, 64)):
        script = Script([row] * 64)
        answer, _ = model.chat(tokenizer, "你好", logits_processor=[script], **options)
        assert len(script.prompt) + len(answer) == length
    assert (
        model.chat(tokenizer, "你好", max_new_tokens=3, logits_processor=[Script([row] * 9)])[0] == "好好好"
    )
    stops_at_b = {"logits_processor": [Script([row, 400, row])], "eos_token_id": 400}
    assert model.chat(tokenizer, "你好", **stops_at_b)[0] == "好"


def test_the_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match=r"gives id \d+, but the model has only 65024 tokens"):
        small_model("chatglm3-6b").chat(tokenizer_of("glm-4-9b-chat"), "你好")
    with pytest.raises(UsageError, match="object is not a tokenizer of"):
        small_model("chatglm3-6b").chat(_NoTokenizer(), "你好")


class _NoTokenizer:
    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> None:
        return None


_NoTokenizer.__name__ = "object"


def test_wrong_histories() -> None:
    with pytest.raises(UsageError, match="takes history as a list of messages"):
        small_model("chatglm3-6b").chat(tokenizer_of("chatglm3-6b"), "你好", [("a", "b")])
    with pytest.raises(UsageError, match="pairs"):
        small_model("chatglm2-6b").chat(tokenizer_of("chatglm2-6b"), "你好", ["a"])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 2.5}, {"max_length": "x"}, {"max_length": 0},
        {"max_length": True}, {"temperature": -1}, {"temperature": "hot"}, {"temperature": torch.nan}, {"top_p": 1.5},
        {"eos_token_id": "x"}, {"eos_token_id": [2, None]}, {"eos_token_id": -1},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    name = next(iter(options))
    for method in ("chat", "stream_chat"):
        with pytest.raises(UsageError, match=f"^{name} must be .*, not "):
            getattr(small_model("chatglm2-6b"), method)(tokenizer_of("chatglm2-6b"), "你好", **options)


def test_options_that_are_left_to_us() -> None:
    model, tokenizer = small_model("chatglm2-6b"), tokenizer_of("chatglm2-6b")
    answer = model.chat(tokenizer, "你好", **GREEDY)
    assert model.chat(tokenizer, "你好", temperature=0, max_new_tokens=12) == answer
    assert model.chat(tokenizer, "你好", eos_token_id=None, **GREEDY) == answer
    *_, last = model.stream_chat(tokenizer, "你好", temperature=0.0, eos_token_id=None, max_new_tokens=12)
    assert last == answer


def test_invalid_scores() -> None:
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[0.0, nan, 1], [0, inf, 1], [-inf, -inf, -inf], [-inf, 2, 1]])
    fixed = InvalidScoreLogitsProcessor(2)(torch.zeros(4, 1, dtype=torch.long), scores)
    harmless = [0, 0, 5e4]
    assert fixed.tolist() == [harmless, harmless, harmless, [-inf, 2, 1]]
    assert InvalidScoreLogitsProcessor(2)(None, scores.half()).isfinite()[:3].all()


@pytest.mark.parametrize(("name", "row"), [("chatglm2-6b", 5), ("glm-4-9b-chat", 198)])
def test_a_model_that_produces_no_numbers(name: str, row: int) -> None:
    model, tokenizer = small_model.__wrapped__(name), tokenizer_of(name)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    prompt = prompt_for(tokenizer)
    expected = prompt.reply(prompt.decode([row] * 3).rstrip("\ufffd"), "你好", [])
    assert model.chat(tokenizer, "你好", max_new_tokens=3) == expected
