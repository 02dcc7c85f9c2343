"""The application: routes, guards, errors."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection
from datetime import datetime
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._version import __version__
from . import openai
from .answers import AnswerReader
from .conversation import from_pairs
from .errors import ApiError, crashed, from_validation
from .guard import Guard
from .metrics import Metrics
from .schemas import ClassicRequest
from .service import Service
from .streams import unless_left, whole

_ADDRESSES = {
    "/",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/openapi.json",
}


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    max_body: int = 4 << 20,
    cors: Collection[str] = (),
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The ASGI application for one model.

    Args:
        service: the model.
        api_key: see `Guard`.
        max_body: see `Guard`.
        cors: origins whose pages may ask, ``*`` for all.
        hosts: see `Guard`.
    """
    # The usual pages with documentation load scripts from elsewhere.
    app = FastAPI(title="glmquant", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS)
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, responses={200: {"content": {"text/html": {}}}})
    async def chat_page() -> HTMLResponse:
        """A page to chat with the model."""
        return HTMLResponse(page, headers=policy)

    @app.post("/")
    async def classic(body: ClassicRequest, request: Request) -> dict[str, Any]:
        """THUDM's address for ChatGLM-6B and ChatGLM2-6B."""
        pairs = body.history or []
        asked = from_pairs(service.prompt, body.prompt, pairs)
        with service.reserve(asked.length(service.most_characters)) as place:
            ids = await unless_left(request, place.encode(lambda: asked.ids(service.prompt)))
            if body.max_length is not None and body.max_length <= len(ids):
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, so max_length {body.max_length} leaves none for the answer.",
                    param="max_length", code="context_length_exceeded",
                )  # fmt: skip
            ticket = place.submit(
                ids, max_new_tokens=None if body.max_length is None else body.max_length - len(ids),
                temperature=body.temperature, top_p=body.top_p,
            )  # fmt: skip
        service.log("asked", [*pairs, body.prompt])
        (update,) = await whole(request, [ticket])
        answer = AnswerReader(service.prompt).read(update.text, finished=True).content
        service.log("answered", update.text)
        return {
            "response": answer,
            "history": [*pairs, (body.prompt, answer)],
            "status": 200,
            "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken."""
        engine = service.engine
        state = "failed" if engine.failed else "shutting down" if engine.draining else "ok"
        shown = {"status": state, "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(shown, 200 if state == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.include_router(openai.router(service))
    app.exception_handler(ApiError)(_on_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(HTTPException)(_on_http)
    app.exception_handler(Exception)(_on_crash)
    # The last one added is the first to see a request.
    app.add_middleware(Guard, api_key=api_key, max_body=max_body, hosts=hosts)
    app.add_middleware(_Counted, metrics=service.metrics)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    return app


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error.", "content": {"application/json": {"schema": _ERROR}}},
}


def _page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that allow it nothing but itself and this server."""
    html = (resources.files(__package__) / "chat.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        400: "the body is no JSON in UTF-8.",
        404: f"there is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_crash(request: Request, error: Exception) -> Response:
    return crashed().response()


class _Counted:
    """ASGI middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in _ADDRESSES else "other"

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        return await self._app(scope, receive, noting)
