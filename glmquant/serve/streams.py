"""Server-sent events, for as long as the client listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, crashed
from .jobs import Update
from .service import Ticket

T = TypeVar("T")
logger = logging.getLogger(__name__)

_HEARTBEAT = 15.0  # seconds without news after which a comment keeps proxies from closing the connection


class EventStream(Response):
    """Sends the JSON values of a generator as events, then ``[DONE]``; cancels its ticket when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, values: AsyncGenerator[dict[str, Any], None], ticket: Ticket) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._values, self._ticket = values, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ticket.cancel()
            leaving.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):  # the client is gone
                await sending

    async def _send(self, send: Send) -> None:
        async def event(text: str) -> None:
            await send({"type": "http.response.body", "body": f"{text}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._values) as values:
            coming = asyncio.ensure_future(anext(values, None))
            try:
                while True:
                    done, _ = await asyncio.wait({coming}, timeout=_HEARTBEAT)
                    if not done:
                        await event(": waiting")
                        continue
                    error: ApiError | None = None
                    try:
                        value = coming.result()
                        text = _json(value)
                    except ApiError as refused:
                        error = refused
                    except Exception:
                        logger.exception("a stream failed")
                        error = crashed()
                    if error is not None:  # the status has been sent: an event is all that can still tell
                        await event(f"data: {_json(error.body)}")
                        break
                    if value is None:
                        break
                    await event(f"data: {text}")
                    coming = asyncio.ensure_future(anext(values, None))
            finally:
                if not coming.done():
                    coming.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await coming
        await event("data: [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(value: object) -> str:
    """As JSON that every client can read.

    Raises:
        ValueError: it cannot be.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client leaves, and of the error that follows nobody hears."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has closed the connection.")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def whole(request: Request, tickets: Sequence[Ticket]) -> list[Update]:
    """The whole answers.

    Raises:
        ApiError: one of them fails, or the client leaves.
    """

    async def answers() -> list[Update]:
        return await asyncio.gather(*(ticket.last() for ticket in tickets))

    try:
        return await unless_left(request, answers())
    finally:
        for ticket in tickets:
            ticket.cancel()


async def streamed(
    request: Request, values: AsyncGenerator[dict[str, Any], None], ticket: Ticket
) -> EventStream:
    """The answer as events, from the first news on, so that an early error has a status of its own.

    Raises:
        ApiError: it fails at once, or the client leaves.
    """
    try:
        await unless_left(request, ticket.wait())
    except BaseException:
        ticket.cancel()
        raise
    return EventStream(values, ticket)
