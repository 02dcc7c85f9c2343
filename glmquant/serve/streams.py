"""Server-sent events, for as long as the client listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .jobs import Update
from .service import Ticket

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
                    value = coming.result()
                    if value is None:
                        break
                    await event(f"data: {json.dumps(value, ensure_ascii=False)}")
                    coming = asyncio.ensure_future(anext(values, None))
            except ApiError as error:
                await event(f"data: {json.dumps(error.body, ensure_ascii=False)}")
            finally:
                if not coming.done():
                    coming.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await coming
        await event("data: [DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, tickets: list[Ticket]) -> list[Update]:
    """The whole answers; cancels them when the client leaves, which nobody hears of.

    Raises:
        ApiError: one of them fails.
    """
    answers = asyncio.ensure_future(asyncio.gather(*(ticket.last() for ticket in tickets)))
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((answers, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            answers.cancel()
            raise ApiError(499, "the client has closed the connection.")
        return answers.result()
    finally:
        leaving.cancel()
        for ticket in tickets:
            ticket.cancel()
