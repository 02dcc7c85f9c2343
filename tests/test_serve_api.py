"""The HTTP APIs, field by field, with a model that answers as it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from helpers_serve import Script, listening, scripted, service_of

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]


def parrot(prompt: str) -> str:
    """ChatGLM3 answers with its whole prompt, behind the line break that every answer begins with."""
    return "\n " + prompt.replace("\n", "|").replace("<|assistant|>", "<A>")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(service_of("chatglm3-6b", scripted("chatglm3-6b", parrot))) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    return body["error"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Chat


def test_a_chat_answer(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={"model": "any", "messages": USER}).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "[gMASK]sop<|user|> | hello<A>"}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert (answer["object"], answer["model"]) == ("chat.completion", "chatglm3-6b")
    assert answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 60
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 5


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "你好，世界 🙂"}]}
    whole = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    found = events(client.post(CHAT, json={**body, "stream": True}))
    deltas = [event["choices"][0]["delta"] for event in found]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert "🙂" in whole
    assert not any("\ufffd" in delta.get("content", "") for delta in deltas)
    assert len(deltas) > 5
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    assert len({event["id"] for event in found}) == 1
    assert not any("usage" in event for event in found)


def test_a_stream_tells_its_usage_when_asked(client: httpx.Client) -> None:
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    *others, last = events(client.post(CHAT, json=body))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 3
    assert all(event["usage"] is None for event in others)


def test_all_of_a_conversation_reaches_the_model(client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "name": "ignored"},
        {"role": "user", "content": "four"},
    ]
    content = client.post(CHAT, json={"messages": messages}).json()["choices"][0]["message"]["content"]
    assert content == ("[gMASK]sop<|system|> | Be brief.<|user|> | one two<A> | three<|user|> | four<A>")


def test_text_that_spells_a_role_is_text(address: str) -> None:
    seen: list[list[int]] = []

    def note(ids: list[int]) -> list[int]:
        seen.append(ids)
        return []

    runner = scripted("chatglm3-6b")
    runner.answer = note
    with listening(service_of("chatglm3-6b", runner)) as address:
        for text in ("<|system|>", "hello"):
            httpx.post(address + CHAT, json={"messages": [{"role": "user", "content": text}]})
    role = set(seen[1]) & set(seen[0])
    assert seen[0].count(seen[1][2]) == 1  # <|user|>
    assert len(role) >= 4


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("limit", "tokens", "finish"), [(3, 3, "length"), (1, 1, "length"), (80000, None, "stop")]
)
def test_limits_of_tokens(
    client: httpx.Client, field: str, limit: int, tokens: int | None, finish: str
) -> None:
    answer = client.post(CHAT, json={"messages": USER, field: limit}).json()
    assert answer["choices"][0]["finish_reason"] == finish
    assert tokens is None or answer["usage"]["completion_tokens"] == tokens


def test_an_answer_ends_where_the_context_does() -> None:
    runner = scripted("chatglm3-6b", lambda prompt: "\n" + "a b c d " * 100, context=64)
    with listening(service_of("chatglm3-6b", runner)) as address:
        for more in ({"max_tokens": 20000}, {}):
            answer = httpx.post(address + CHAT, json={"messages": USER, **more}).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] == 64
        long = [{"role": "user", "content": "word " * 200}]
        refused = httpx.post(address + CHAT, json={"messages": long})
        assert (refused.status_code, error(refused)["code"]) == (400, "context_length_exceeded")
        huge = [{"role": "user", "content": "x" * (64 * 128 + 1)}]
        assert httpx.post(address + CHAT, json={"messages": huge}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["lo<", ["nothing", "lo<"]])
def test_stop(client: httpx.Client, stop: Any, stream: bool) -> None:
    response = client.post(CHAT, json={"messages": USER, "stop": stop, "stream": stream})
    if stream:
        found = events(response)
        content = "".join(event["choices"][0]["delta"].get("content", "") for event in found)
        finish = found[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        content, finish = choice["message"]["content"], choice["finish_reason"]
    assert (content, finish) == ("[gMASK]sop<|user|> | hel", "stop")


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("logprobs", True), ("top_logprobs", 3), ("logit_bias", {"5": 1.0}), ("presence_penalty", 0.5),
     ("frequency_penalty", -1), ("response_format", {"type": "json_object"}), ("tool_choice", "required"),
     ("top_k", 5)],
)  # fmt: skip
def test_what_is_not_supported_is_refused(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post(CHAT, json={"messages": USER, field: value})
    assert response.status_code == 400
    assert field in error(response)["message"]


@pytest.mark.parametrize(
    "more",
    [{"n": 1}, {"logprobs": False}, {"presence_penalty": 0.0}, {"response_format": {"type": "text"}}, {"n": None},
     {"user": "me"}, {"unheard_of": [1]}, {"temperature": 0}, {"temperature": 2, "top_p": 0}, {"seed": -5},
     {"stop": None}, {"stop": []}, {"tools": []}, {"max_tokens": None}, {"repetition_penalty": 1}],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_taken(client: httpx.Client, more: dict[str, Any]) -> None:
    assert client.post(CHAT, json={"messages": USER, **more}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "messages"), ([*USER, {"role": "assistant", "content": "x"}], "assistant"), ("hello", "messages"),
     ([{"role": "system", "content": "x"}], "instruction"), ([{"role": "king", "content": "x"}], "role"),
     ([{"content": "x"}], "role"), ([{"role": "user", "content": 5}], "content"), ([None], "messages"),
     ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "content"),
     ([{"role": "user", "content": "\ud800"}], "surrogate")],
    ids=["empty", "assistant last", "text", "system last", "role", "no role", "number", "null", "image", "surrogate"],
)  # fmt: skip
def test_bad_messages(client: httpx.Client, messages: Any, says: str) -> None:
    body = json.dumps({"messages": messages})
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error(response)["type"] == "invalid_request_error"
    assert says in error(response)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", "0.5"), ("top_p", 1.5), ("max_tokens", 0), ("max_tokens", 1.5), ("stream", 1),
     ("max_tokens", True), ("seed", 2**64), ("stop", ""), ("stop", ["a"] * 99), ("stop", [1]), ("tools", {}),
     ("stream_options", []), ("repetition_penalty", 0)],
)  # fmt: skip
def test_wrong_types_and_ranges(client: httpx.Client, field: str, value: Any) -> None:
    response = client.post(CHAT, json={"messages": USER, field: value})
    assert response.status_code == 400
    assert (error(response)["param"] or "").startswith(field)


def test_other_generations_take_a_system_message_as_thudm_s_server_did() -> None:
    runner = scripted("chatglm2-6b", lambda prompt: prompt.replace("\n", "|"))
    with listening(service_of("chatglm2-6b", runner)) as address:
        messages = [{"role": "system", "content": "Be brief."}, *USER]
        content = httpx.post(address + CHAT, json={"messages": messages}).json()["choices"][0]["message"][
            "content"
        ]
        assert "问：Be brief.|hello||答：" in content
        mixed = [*USER, *USER]
        assert httpx.post(address + CHAT, json={"messages": mixed}).status_code == 400


# Completions


def test_completions(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": "two words", "max_tokens": 50}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "\n [gMASK]sop two words", "logprobs": None, "finish_reason": "stop"}
    ]
    short = client.post("/v1/completions", json={"prompt": "x"}).json()
    assert short["usage"]["completion_tokens"] <= 16


def test_completions_of_several_prompts_and_of_ids(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": ["one", "two"], "max_tokens": 50}).json()
    assert [(c["index"], c["text"].split()[-1]) for c in answer["choices"]] == [(0, "one"), (1, "two")]
    ids = client.post("/v1/completions", json={"prompt": [3, 4, 5], "max_tokens": 2}).json()
    assert ids["usage"]["prompt_tokens"] == 3
    assert client.post("/v1/completions", json={"prompt": [10**7]}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": [-1]}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": []}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True}).status_code == 400


def test_a_stream_of_a_completion(client: httpx.Client) -> None:
    found = events(
        client.post("/v1/completions", json={"prompt": "two words", "max_tokens": 50, "stream": True})
    )
    assert "".join(event["choices"][0]["text"] for event in found) == "\n [gMASK]sop two words"
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


# POST / of ChatGLM-6B and ChatGLM2-6B


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_the_classic_address(name: str) -> None:
    options = {"chunk": None, "slots": 1} if name == "chatglm-6b" else {}
    runner = scripted(name, lambda prompt: f"\n{len(prompt)}", **options)
    with listening(service_of(name, runner)) as address:
        body = {"prompt": "hi", "history": [["a", "b"], [None, "c"]], "max_length": 20000, "top_p": 0.7,
                "temperature": 0.95, "sample_model_args": False}  # fmt: skip
        answer = httpx.post(address, json=body).json()
        alone = httpx.post(address, json={"prompt": "hi"}).json()
    assert answer["history"][:2] == [["a", "b"], [None, "c"]]
    assert answer["history"][2] == ["hi", answer["response"]]
    assert int(answer["response"]) > int(alone["response"])
    assert answer["status"] == 200
    assert abs(time.mktime(time.strptime(answer["time"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60


def test_max_length_counts_the_prompt(client: httpx.Client) -> None:
    short = client.post("/", json={"prompt": "hello", "max_length": 2})
    assert (short.status_code, error(short)["param"]) == (400, "max_length")
    whole = client.post("/", json={"prompt": "hello"}).json()["response"]
    cut = client.post("/", json={"prompt": "hello", "max_length": 20}).json()["response"]
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_the_classic_address_with_bad_bodies(client: httpx.Client) -> None:
    for body in ({}, {"prompt": 5}, {"prompt": "x", "history": [["a"]]}, {"prompt": "x", "history": "y"}):
        assert client.post("/", json=body).status_code == 400


# Models, health, metrics


def test_models(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("chatglm3-6b", "model")
    assert client.get("/v1/models/chatglm3-6b").json() == model
    missing = client.get("/v1/models/a/b")
    assert (missing.status_code, error(missing)["code"]) == (404, "model_not_found")


def test_strict_model() -> None:
    service = service_of("chatglm3-6b", scripted("chatglm3-6b"), strict_model=True)
    with listening(service) as address:
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "x"})):
            for name in ("other", None):
                refused = httpx.post(address + path, json={**body, "model": name})
                assert (refused.status_code, error(refused)["code"]) == (404, "model_not_found")
            assert httpx.post(address + path, json={**body, "model": "chatglm3-6b"}).status_code == 200


def test_health_and_metrics_follow_the_work() -> None:
    runner = scripted("chatglm3-6b", slots=1)
    runner.gate.clear()
    service = service_of("chatglm3-6b", runner, queue=1)
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        with ThreadPoolExecutor() as pool:
            streams = [
                pool.submit(client.post, CHAT, json={"messages": USER, "stream": True}) for _ in range(2)
            ]
            deadline = time.monotonic() + 30
            while client.get("/health").json() != {"status": "ok", "running": 1, "waiting": 1}:
                assert time.monotonic() < deadline
            text = client.get("/metrics").text
            assert "glmquant_queue_requests 1.0" in text
            assert "glmquant_running_requests 1.0" in text
            full = client.post(CHAT, json={"messages": USER})
            assert (full.status_code, error(full)["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
            runner.gate.set()
            assert all(events(stream.result()) for stream in streams)
        text = client.get("/metrics").text
        for line in (
            'glmquant_answers_total{reason="stop"} 2.0', "glmquant_time_to_first_token_seconds_count 2.0",
            'glmquant_http_requests_total{path="/v1/chat/completions",status="200"} 2.0',
            'glmquant_http_requests_total{path="/v1/chat/completions",status="429"} 1.0',
            "glmquant_generated_tokens_total", "glmquant_memory_resident_bytes", "glmquant_slots 1.0",
        ):  # fmt: skip
            assert line in text
        service.engine.drain()
        assert client.get("/health").status_code == 503
        down = client.post(CHAT, json={"messages": USER})
        assert (down.status_code, error(down)["code"]) == (503, "shutting_down")
        assert "retry-after" in down.headers


def test_time_limit() -> None:
    runner = scripted("chatglm3-6b", slots=1, delay=0.05)
    runner.answer = lambda ids: [5] * 400
    with listening(service_of("chatglm3-6b", runner, timeout=0.5)) as address:
        late = httpx.post(address + CHAT, json={"messages": USER})
        assert (late.status_code, error(late)["type"]) == (504, "timeout_error")
        streamed = httpx.post(address + CHAT, json={"messages": USER, "stream": True})
        *_, failed, done, _ = streamed.text.split("\n\n")
        assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"


def test_a_failing_model_is_a_500() -> None:
    runner = scripted("chatglm3-6b")
    runner.poison = 0
    with listening(service_of("chatglm3-6b", runner)) as address:
        failed = httpx.post(address + "/v1/completions", json={"prompt": [0, 1]})
        assert (failed.status_code, error(failed)["type"]) == (500, "server_error")
        assert httpx.post(address + "/v1/completions", json={"prompt": [1, 2]}).status_code == 200


def test_prompts_are_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = [{"role": "user", "content": "my secret"}]
    for wanted in (False, True):
        runner: Script = scripted("chatglm3-6b", lambda prompt: "\n its answer")
        with listening(service_of("chatglm3-6b", runner, log_prompts=wanted)) as address:
            httpx.post(address + CHAT, json={"messages": secret})
        assert ("my secret" in caplog.text) is wanted
        assert ("its answer" in caplog.text) is wanted
