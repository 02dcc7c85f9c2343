"""Calls of functions: OpenAI's tools and the older functions, for ChatGLM3-6B and GLM-4-9B-chat."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from helpers_serve import listening, scripted, service_of, tokenizer_of
from helpers_tokenizers import require_published

from glmquant.prompts import prompt_for
from glmquant.serve.answers import Answer, AnswerReader, Call

CHAT = "/v1/chat/completions"
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
ASK = [{"role": "user", "content": "Weather in Oslo?"}]
WRITTEN = {
    "chatglm3-6b": "get_weather\n ```python\ntool_call(city='Oslo')\n```",
    "glm-4-9b-chat": 'get_weather\n{"city": "Oslo"}',
}


def answered(name: str, text: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The message and finish_reason, which have to be the same as a stream's."""
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return text

    with listening(service_of(name, scripted(name, answer, context=2000))) as address:
        (choice,) = httpx.post(address + CHAT, json=body, timeout=60).json()["choices"]
        stream = httpx.post(address + CHAT, json={**body, "stream": True}, timeout=60).text
    message: dict[str, Any] = {"content": ""}
    for line in stream.split("\n\n")[:-2]:
        part = json.loads(line.removeprefix("data: "))["choices"][0]
        delta = part["delta"]
        message["content"] += delta.pop("content", "")
        for call in delta.get("tool_calls", ()):
            assert call.pop("index") >= 0
        message |= delta
    assert part["finish_reason"] == choice["finish_reason"]
    whole = json.loads(json.dumps(choice["message"]))
    for each in (message, whole):
        each["content"] = each["content"] or None
        for call in each.get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
    assert message == whole
    return choice["message"], choice["finish_reason"]


@pytest.mark.parametrize("name", WRITTEN)
def test_tools(name: str) -> None:
    if name == "glm-4-9b-chat":
        require_published(name)  # its chat template says what tools look like
    message, finish = answered(name, WRITTEN[name], {"messages": ASK, "tools": TOOLS})
    (call,) = message["tool_calls"]
    assert (message["content"], finish, call["type"]) == (None, "tool_calls", "function")
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


def test_the_older_functions() -> None:
    body = {"messages": ASK, "functions": [WEATHER], "function_call": "auto"}
    message, finish = answered("chatglm3-6b", WRITTEN["chatglm3-6b"], body)
    assert finish == "function_call"
    assert message["function_call"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    ("more", "text", "content"),
    [
        ({"tools": TOOLS}, "\n Sure,\nwith pleasure.", "Sure,\nwith pleasure."),
        ({"tools": TOOLS}, "Sure,\nwith pleasure.", "Sure,\nwith pleasure."),
        ({"tools": TOOLS}, "get_weather\n no call at all", "get_weather\n no call at all"),
        ({"tools": TOOLS}, "get_weather\n ```python\ntool_call(__import__('os').getcwd())\n```", None),
        ({"tools": TOOLS, "tool_choice": "none"}, WRITTEN["chatglm3-6b"], WRITTEN["chatglm3-6b"]),
        ({}, WRITTEN["chatglm3-6b"], WRITTEN["chatglm3-6b"]),
        ({"functions": [WEATHER], "function_call": "none"}, "\n words", "words"),
    ],
    ids=["words", "no first line", "no call", "code", "none", "no tools", "function_call none"],
)
def test_what_is_no_call_is_content(more: dict[str, Any], text: str, content: str | None) -> None:
    message, finish = answered("chatglm3-6b", text, {"messages": ASK, **more})
    assert finish == "stop"
    assert message["content"] == (text if content is None else content)
    assert not {"tool_calls", "function_call"} & set(message)


def test_words_and_several_calls() -> None:
    text = f"\n I will look.<|assistant|>{WRITTEN['chatglm3-6b']}<|assistant|>{WRITTEN['chatglm3-6b']}"
    message, finish = answered("chatglm3-6b", text, {"messages": ASK, "tools": TOOLS})
    assert (message["content"], finish, len(message["tool_calls"])) == ("I will look.", "tool_calls", 2)


def test_one_call_at_a_time() -> None:
    text = f"{WRITTEN['chatglm3-6b']}<|assistant|>{WRITTEN['chatglm3-6b']}"
    for parallel, calls in ((None, 2), (True, 2), (False, 1)):
        body = {"messages": ASK, "tools": TOOLS, "parallel_tool_calls": parallel}
        assert len(answered("chatglm3-6b", text, body)[0]["tool_calls"]) == calls


@pytest.mark.parametrize("form", ["tools", "functions"])
def test_the_model_sees_tools_calls_and_results(form: str) -> None:
    """As `chat` of ChatGLM3 shows them to it."""
    prompt = prompt_for(tokenizer_of("chatglm3-6b"))
    seen: list[list[int]] = []
    runner = scripted("chatglm3-6b", context=4000)
    runner.answer = lambda ids: seen.append(ids) or []
    arguments = {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'}
    if form == "tools":
        call: dict[str, Any] = {"tool_calls": [{"id": "a", "type": "function", "function": arguments}]}
        result: dict[str, Any] = {"role": "tool", "tool_call_id": "a", "content": "rain"}
        offer: dict[str, Any] = {"tools": TOOLS}
    else:
        call, offer = {"function_call": arguments}, {"functions": [WEATHER]}
        result = {"role": "function", "name": "get_weather", "content": "rain"}
    messages = [
        {"role": "system", "content": "Help."},
        *ASK,
        {"role": "assistant", "content": None, **call},
        result,
    ]
    with listening(service_of("chatglm3-6b", runner)) as address:
        assert httpx.post(address + CHAT, json={"messages": messages, **offer}, timeout=60).status_code == 200
    history = prompt.history(
        [
            {"role": "system", "content": "Help.", "tools": [WEATHER]},
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "metadata": "get_weather",
             "content": "```python\ntool_call(city='Oslo', days=3)\n```"},
        ]
    )  # fmt: skip
    assert seen == [prompt.ids("rain", history, "observation")]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tools": TOOLS, "functions": [WEATHER]}, "not both"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
def test_bad_tools(more: dict[str, Any], says: str) -> None:
    with listening(service_of("chatglm3-6b", scripted("chatglm3-6b"))) as address:
        refused = httpx.post(address + CHAT, json={"messages": ASK, **more})
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm-6b"])
def test_older_generations_know_no_tools(name: str) -> None:
    runner = scripted(name, chunk=None, slots=1) if name == "chatglm-6b" else scripted(name)
    with listening(service_of(name, runner)) as address:
        refused = httpx.post(address + CHAT, json={"messages": ASK, "tools": TOOLS})
    assert refused.status_code == 400
    assert "functions" in refused.json()["error"]["message"]


# Reading while it is written


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatglm-6b", "  你好,世界!  再见:x  [[训练时间]] ok [[训练 "),
        ("chatglm2-6b", "\n 你好 , [[训练时间]] ok [["),
        ("chatglm3-6b", "\n 你好\n\n a [[训练时间]] b <|assist"),
        (
            "chatglm3-6b",
            "你好 <|assistant|>\n more <|assistant|> get_weather\n ```\ntool_call(city='x')\n```",
        ),
        ("chatglm3-6b", "get_w"),
    ],
)
def test_content_only_grows(name: str, text: str) -> None:
    reader = AnswerReader(prompt_for(tokenizer_of(name)), ["get_weather"], ["STOP"])
    final = reader.read(text, finished=True)
    shown = [reader.read(text[:end], finished=False) for end in range(len(text) + 1)]
    for before, after in zip(shown, [*shown[1:], final], strict=True):
        assert after.content.startswith(before.content)
        assert after.calls[: len(before.calls)] == before.calls
    assert "训" not in final.content.replace("[[训练 ", "").replace("[[训练", "")


def test_arguments_that_json_lacks() -> None:
    reader = AnswerReader(prompt_for(tokenizer_of("chatglm3-6b")), ["f"])
    text = "f\n ```python\ntool_call(a=(1, 2), b={'k': None}, c={3})\n```"
    assert reader.read(text, True) == Answer("", (Call("f", '{"a": [1, 2], "b": {"k": null}, "c": [3]}'),))


@pytest.mark.parametrize(
    "value",
    ["{(1, 2): 3}", "b'x'", "2j", "...", "'\\ud800'", "1e999", "[-1e999]", "[" * 400 + "]" * 400, "{1, (2, b'')}"],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_arguments_that_are_no_json_are_content(value: str) -> None:
    text = f"get_weather\n ```python\ntool_call(city={value})\n```"
    message, finish = answered("chatglm3-6b", text, {"messages": ASK, "tools": TOOLS})
    assert (message["content"], finish) == (text, "stop")


@pytest.mark.parametrize("city", ["NaN", "1e999", '"\\ud800"'])
def test_glm_4_s_arguments_that_are_no_json_are_content(city: str) -> None:
    text = f'get_weather\n{{"city": {city}}}'
    message, finish = answered("glm-4-9b-chat", text, {"messages": ASK, "tools": TOOLS})
    assert (message["content"], finish) == (text, "stop")


def test_a_stream_that_crashes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: AnswerReader, text: str, finished: bool) -> Answer:
        raise ZeroDivisionError

    monkeypatch.setattr(AnswerReader, "read", crash)
    with listening(service_of("chatglm3-6b", scripted("chatglm3-6b"))) as address:
        stream = httpx.post(address + CHAT, json={"messages": ASK, "stream": True}, timeout=60).text
    *_, error, done, _ = stream.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert done == "data: [DONE]"
