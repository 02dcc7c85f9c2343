"""Errors as clients of OpenAI expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from .jobs import Failed, QueueFull, Refused, ShuttingDown, TimedOut


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs; None where the type says all.
        param: the field that is wrong.
        headers: to add.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        # Half a surrogate pair from the request may be quoted in the message, and is no UTF-8.
        message = self.message.encode(errors="replace").decode()
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


_TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}


def from_engine(error: Refused, retry_after: int) -> ApiError:
    """What the engine refused, as an answer; `retry_after` are seconds."""
    retry = {"Retry-After": str(retry_after)}
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", headers=retry)
    if isinstance(error, TimedOut):
        return ApiError(504, str(error), code="timeout")
    assert isinstance(error, Failed)
    return ApiError(500, str(error), code="model_failed")


def crashed() -> ApiError:
    """What nobody thought of."""
    return ApiError(500, "the server failed on this request; its log says how.", code="internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong in a body, the first of it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is no JSON: {reason}.", code="invalid_json")
    # Where a value may be of several kinds, pydantic names each; the field is what a client knows.
    path = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(path) or None
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return ApiError(400, f"{param or 'body'}: {message}.", param=param, code="invalid_value")
