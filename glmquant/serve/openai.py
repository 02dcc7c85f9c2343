"""OpenAI's addresses: chat completions, completions, models."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from .answers import Answer, AnswerReader, Call
from .conversation import from_messages
from .errors import ApiError
from .jobs import Update
from .schemas import ChatRequest, CompletionRequest
from .service import Service, Ticket
from .streams import streamed, unless_left, whole

Json = dict[str, Any]

_WHOLE_OR_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


def router(service: Service) -> APIRouter:
    """The routes of one model."""
    routes = APIRouter(prefix="/v1")
    model = {
        "id": service.settings.name, "object": "model", "created": service.created, "owned_by": "glmquant",
        "max_model_len": service.context,
    }  # fmt: skip

    @routes.get("/models")
    async def models() -> Json:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> Json:
        """The model that is served, by its name."""
        if name != service.settings.name:
            raise ApiError(404, f"there is no model {name!r} here.", param="model", code="model_not_found")
        return model

    @routes.post("/chat/completions", responses=_WHOLE_OR_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        functions = body.offered
        asked = from_messages(service.prompt, body.messages, functions)
        limits = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        with service.reserve(asked.length(service.most_characters)) as place:
            ids = await unless_left(request, place.encode(lambda: asked.ids(service.prompt)))
            ticket = place.submit(
                ids, max_new_tokens=min(limits, default=None), temperature=body.temperature, top_p=body.top_p,
                seed=body.seed, stop=body.stops, repetition_penalty=body.repetition_penalty,
            )  # fmt: skip
        service.log("asked", [m.model_dump(exclude_none=True) for m in body.messages])
        reader = AnswerReader(service.prompt, [f.name for f in functions], body.stops)
        form = _Chat(service, body, ticket, reader)
        if body.stream:
            return await streamed(request, form.stream(), ticket)
        (update,) = await whole(request, [ticket])
        return JSONResponse(form.whole(update))

    @routes.post("/completions", responses=_WHOLE_OR_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        service.check_model(body.model)
        if body.stream and len(body.prompts) > 1:
            raise ApiError(400, "a stream continues one prompt only.", param="prompt", code="invalid_value")
        with service.reserve(*map(len, body.prompts)) as place:
            prompts = [
                await unless_left(request, place.encode(functools.partial(service.prompt_ids, prompt)))
                for prompt in body.prompts
            ]
            tickets: list[Ticket] = []
            try:
                for ids in prompts:
                    tickets.append(place.submit(
                        ids, max_new_tokens=body.max_tokens or _COMPLETION, temperature=body.temperature,
                        top_p=body.top_p, seed=body.seed, stop=body.stops, repetition_penalty=body.repetition_penalty,
                    ))  # fmt: skip
            except ApiError:
                for ticket in tickets:
                    ticket.cancel()
                raise
        service.log("asked", body.prompts)
        text = _Text(service, body, tickets)
        if body.stream:
            return await streamed(request, text.stream(), tickets[0])
        return JSONResponse(text.whole(await whole(request, tickets)))

    return routes


_COMPLETION = 16  # tokens, where a request for a completion does not say: OpenAI's


def _usage(tickets: list[Ticket], updates: list[Update]) -> Json:
    prompt = sum(len(ticket.job.ids) for ticket in tickets)
    generated = sum(update.tokens for update in updates)
    # How much of a prompt was in memory would tell what others have asked; /metrics has the sum.
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


class _Form:
    """The frame of an answer."""

    def __init__(self, service: Service, kind: str, prefix: str, usage: bool) -> None:
        self._service, self._with_usage = service, usage
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}

    def _frame(self, choices: list[Json], usage: Json | None = None, chunk: bool = False) -> Json:
        head = {**self._head, "model": self._service.settings.name, "choices": choices}
        if chunk:
            head["object"] = str(head["object"]).removesuffix(".chunk") + ".chunk"
        if usage is not None or (chunk and self._with_usage):
            head["usage"] = usage
        return head


class _Chat(_Form):
    """Answers of ``/v1/chat/completions``."""

    def __init__(self, service: Service, body: ChatRequest, ticket: Ticket, reader: AnswerReader) -> None:
        usage = body.stream_options is not None and body.stream_options.include_usage
        super().__init__(service, "chat.completion", "chatcmpl", usage)
        self._ticket, self._reader = ticket, reader
        self._older = bool(body.functions)
        self._calls_at_once = 1 if body.parallel_tool_calls is False else None

    def whole(self, update: Update) -> Json:
        answer = self._read(update)
        self._service.log("answered", update.text)
        message: Json = {"role": "assistant", "content": answer.content}
        if answer.calls:
            message["content"] = answer.content or None
            message |= self._calls(answer.calls)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish(update, answer),
        }
        return self._frame([choice], _usage([self._ticket], [update]))

    async def stream(self) -> AsyncGenerator[Json, None]:
        sent, update, answer = "", Update(), Answer("")
        yield self._chunk({"role": "assistant", "content": ""})
        async for update in self._ticket.updates():
            answer = self._read(update)
            if len(answer.content) > len(sent):
                yield self._chunk({"content": answer.content[len(sent) :]})
                sent = answer.content
        self._service.log("answered", update.text)
        if answer.calls:
            yield self._chunk(self._calls(answer.calls, indexed=True))
        yield self._chunk({}, self._finish(update, answer))
        if self._with_usage:
            yield self._frame([], _usage([self._ticket], [update]), chunk=True)

    def _read(self, update: Update) -> Answer:
        answer = self._reader.read(update.text, update.finish is not None)
        return replace(answer, calls=answer.calls[: self._calls_at_once])

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._frame([choice], chunk=True)

    def _calls(self, calls: tuple[Call, ...], indexed: bool = False) -> Json:
        if self._older:
            return {"function_call": {"name": calls[0].name, "arguments": calls[0].arguments}}
        return {
            "tool_calls": [
                {
                    **({"index": n} if indexed else {}),
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(calls)
            ]
        }

    def _finish(self, update: Update, answer: Answer) -> str | None:
        if answer.calls:
            return "function_call" if self._older else "tool_calls"
        return update.finish


class _Text(_Form):
    """Answers of ``/v1/completions``."""

    def __init__(self, service: Service, body: CompletionRequest, tickets: list[Ticket]) -> None:
        usage = body.stream_options is not None and body.stream_options.include_usage
        super().__init__(service, "text_completion", "cmpl", usage)
        self._tickets = tickets
        self._reader = AnswerReader(None, stop=body.stops)

    def whole(self, updates: list[Update]) -> Json:
        choices = [_text(n, update.text, update.finish) for n, update in enumerate(updates)]
        self._service.log("answered", [update.text for update in updates])
        return self._frame(choices, _usage(self._tickets, updates))

    async def stream(self) -> AsyncGenerator[Json, None]:
        sent, update = "", Update()
        async for update in self._tickets[0].updates():
            text = self._reader.read(update.text, update.finish is not None).content
            if len(text) > len(sent):
                yield self._frame([_text(0, text[len(sent) :], None)])
                sent = text
        self._service.log("answered", update.text)
        yield self._frame([_text(0, "", update.finish)])
        if self._with_usage:
            yield self._frame([], _usage(self._tickets, [update]))


def _text(index: int, text: str, finish: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
