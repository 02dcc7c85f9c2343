"""What every request passes before anything else: whose it is, how large, of what kind."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

# Need no key: the page, which holds nothing of the model, and what tells whether the server lives.
_OPEN = {("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health"), ("GET", "/openapi.json")}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_BODY_SECONDS = 60.0


class Guard:
    """ASGI middleware; see the module.

    Args:
        app: what is guarded.
        api_key: that clients must send as a bearer token; None lets everybody in.
        max_body: bytes of a request's body.
        hosts: names under which the server may be asked; None allows all. A page on the internet can make a browser
            ask 127.0.0.1, but only under a name of the page's own.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, max_body: int, hosts: Collection[str] | None = None
    ) -> None:
        self._app, self._max_body = app, max_body
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._admit(scope)
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        if body is None:  # the client has gone
            return None
        return await self._app(scope, _replaying(body, receive), send)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403,
                "this server does not go by the name in the Host header; start it with --allow-host for that name.",
                code="unknown_host",
            )
        if self._key is not None and (scope["method"], scope["path"]) not in _OPEN:
            given = headers.get("authorization", "")
            kind, _, key = given.partition(" ")
            # Headers are latin-1 on the wire; the comparison takes the same time wherever the keys differ.
            same = hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._key)
            if kind.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (
                kind.startswith("application/") and kind.endswith("+json")
            ):
                raise ApiError(
                    415, "send JSON, with Content-Type: application/json.", code="unsupported_media_type"
                )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        too_large = ApiError(
            413,
            f"the body is larger than the {self._max_body} bytes that this server takes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
        stated = headers.get("content-length", "0")
        if stated.isdigit() and int(stated) > self._max_body:
            raise too_large
        try:
            body = await asyncio.wait_for(self._read(receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(
                408, "the body did not arrive in time.", code="timeout", headers={"Connection": "close"}
            ) from None
        if body is not None and len(body) > self._max_body:
            raise too_large
        return body

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or as much of it as shows that it is too large; None when the client leaves."""
        body = bytearray()
        while len(body) <= self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        return bytes(body)


def hosts_of(bind: str, allowed: Collection[str]) -> set[str] | None:
    """The names to be asked under, for a server bound to `bind`; None where any is fine.

    Only a server that nobody else can reach is protected: the others have names that it cannot know.
    """
    if not is_loopback(bind) or "*" in allowed:
        return None
    own = {bind, *_addresses(bind)}
    return {*_LOOPBACK, *(f"[{name}]" if ":" in name else name for name in own), *allowed}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, however it is spelled: 127.0.0.2, 127.1, ::1, localhost."""
    found = [ipaddress.ip_address(address) for address in _addresses(host)]
    return bool(found) and all((getattr(each, "ipv4_mapped", None) or each).is_loopback for each in found)


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _name(host: str) -> str:
    """A Host header without the port."""
    return host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()


def _replaying(body: bytes, receive: Receive) -> Receive:
    first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
