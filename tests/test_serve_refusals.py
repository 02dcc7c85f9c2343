"""Requests that are refused before the model, or the tokenizer, sees them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from helpers_serve import Script, ask, listening, real_service, scripted, service_of, tokenizer_of

from glmquant.errors import UsageError
from glmquant.prompts import prompt_for

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
JSON = {"Content-Type": "application/json"}
ASK = [{"role": "user", "content": "hello"}]


def refused(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a request that is answered with 400."""
    response = httpx.post(address + path, json=body, timeout=60)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_ids_that_chatglm_6b_cannot_read_are_refused_and_harm_nobody() -> None:
    token = prompt_for(tokenizer_of("chatglm-6b")).token
    with listening(real_service("chatglm-6b")) as address:
        for ids in ([5, 6, 7], [5, token("<sop>")], [5, token("[gMASK]")], [5, token("[MASK]")]) * 2:
            assert "[gMASK] <sop>" in refused(address, COMPLETE, {"prompt": ids})["message"]
        for mask in ("[gMASK]", "[MASK]"):
            good = {"prompt": [5, token(mask), token("<sop>")], "max_tokens": 2}
            assert httpx.post(address + COMPLETE, json=good, timeout=60).status_code == 200
        assert httpx.get(address + "/health").json()["status"] == "ok"


def test_errors_of_requests_do_not_end_the_engine() -> None:
    class Particular(Script):
        def step(self, pieces: Any) -> Any:
            if pieces[0].ids == [9]:
                raise UsageError("these ids are no prompt.")
            return super().step(pieces)

    service = service_of("chatglm3-6b", Particular(lambda prompt: [5], 2, 100))
    for _ in range(5):
        assert ask(service.engine, [9])[1].last().error is not None
    assert ask(service.engine, [8], 1)[1].last().finish == "length"
    assert service.engine.stop(10)


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_half_a_surrogate_pair_is_refused_wherever_it_is(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "a", "description": "\ud800"}}]
    with listening(service_of(name, scripted(name))) as address:
        for path, body in (
            (COMPLETE, {"prompt": "\ud800"}),
            (COMPLETE, {"prompt": ["fine", "a \udc00"]}),
            (CHAT, {"messages": ASK, "tools": tools}),
            (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}),
            ("/", {"prompt": "\ud800"}),
        ):
            response = httpx.post(address + path, content=json.dumps(body), headers=JSON, timeout=60)
            assert response.status_code == 400, (path, response.text)
            assert "half of a surrogate pair" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_what_cannot_fit_does_not_reach_the_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with an indent for each level, 20 kB of parameters are megabytes of text; and texts beside messages."""
    service = service_of(name, scripted(name))
    encoded: list[int] = []
    plain = service.prompt.plain
    monkeypatch.setattr(service.prompt, "plain", lambda text: encoded.append(len(text)) or plain(text))
    deep: dict[str, Any] = {f"k{n}": n for n in range(1000)}
    for _ in range(300):
        deep = {"a": deep}
    long = "x" * (service.context * 128 + 1)
    call = {"type": "function", "function": {"name": "f", "arguments": long}}
    spoken = {"role": "assistant", "content": None, "tool_calls": [call]}
    with listening(service) as address:
        for body in (
            {"messages": ASK, "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
            {
                "messages": ASK,
                "tools": [{"type": "function", "function": {"name": "f", "description": long}}],
            },
            {"messages": [*ASK, spoken, *ASK]},
            {"messages": [*ASK, {"role": "user", "content": long}]},
        ):
            assert refused(address, CHAT, body)["code"] == "context_length_exceeded"
        assert (
            refused(address, "/", {"prompt": "", "history": [["", long]]})["code"]
            == "context_length_exceeded"
        )
        assert encoded == []
        assert httpx.post(address + CHAT, json={"messages": ASK}, timeout=60).status_code == 200
        assert encoded
