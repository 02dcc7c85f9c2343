"""A hub on this machine, for the real clients of Hugging Face and ModelScope: `HubServer`.

It speaks what the two clients ask for and nothing more, on a loopback port of its own. It can be slow, cut
connections, change bytes and answer with errors, and it records every request.
"""

from __future__ import annotations

import mmap
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import huggingface, modelscope
from .protocol import Answer, Fault, Request
from .repositories import Repository

_CHUNK = 64 << 10
_CREDIT_S = 0.1


class HubServer:
    """Serves `repositories` at `url`; a context manager.

    Attributes:
        repositories: by name; both hubs offer all of them.
        requests: everything that was asked, in order.
        faults: what goes wrong next.
        ranges: whether large files are given in parts.
        rate: bytes per second of all files together; None for as fast as it goes.
        uploads: large files that came and are in no commit yet, by SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.rate: float | None = None
        self.ranges = True
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self._due = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Under another host name, as on the real hub: clients follow such redirects differently.
        self.storage_url = f"http://localhost:{port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, **options: Any) -> Repository:
        """A new, empty repository."""
        return self.repositories.setdefault(name, Repository(name, **options))

    def file_bytes(self, *parts: str) -> int:
        """Bytes of bodies that were sent for paths that hold each of `parts`."""
        return sum(
            request.sent
            for request in list(self.requests)
            if request.method == "GET" and all(part in _shown(request) for part in parts)
        )

    def fault_for(self, request: Request) -> Fault | None:
        """The fault that now happens to a request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == request.method and fault.where in _shown(request):
                    fault.times -= 1
                    return fault
        return None

    def content(self, sha256: str) -> bytes | mmap.mmap | None:
        """A large file that somebody has uploaded."""
        if sha256 in self.uploads:
            return self.uploads[sha256]
        found = (repository.stored(sha256) for repository in self.repositories.values())
        return next((stored.data for stored in found if stored is not None), None)

    def uploaded(self) -> list[Request]:
        """The requests that brought large files, whole or not."""
        return [request for request in list(self.requests) if request.method == "PUT"]

    def wait_for_turn(self, nbytes: int) -> None:
        """Sleep for as long as `nbytes` take at the rate, which all connections share."""
        if self.rate is None:
            return
        with self.lock:
            # What a thread slept too long is made good by the next.
            self._due = max(self._due, time.monotonic() - _CREDIT_S) + nbytes / self.rate
            due = self._due
        time.sleep(max(0.0, due - time.monotonic()))


def _shown(request: Request) -> str:
    return request.path + "?" + "&".join(f"{k}={v}" for k, v in request.query.items())


def _answer(server: HubServer, request: Request) -> Answer:
    if request.path.startswith(modelscope.PREFIXES):
        return modelscope.answer(server, request)
    return huggingface.answer(server, request)


def _handler_for(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            parts = urlsplit(self.path)
            query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
            headers = {k.lower(): v for k, v in self.headers.items()}
            request = Request(self.command, unquote(parts.path), query, headers)
            with server.lock:
                server.requests.append(request)
            fault = server.fault_for(request)
            if not self._receive(request, fault):
                return
            if fault is not None and fault.status is not None:
                answer = Answer(fault.status, dict(fault.headers))
            else:
                answer = _answer(server, request)
            try:
                self._send(request, answer, fault)
            except OSError:  # the client has gone away
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = _handle

        def _receive(self, request: Request, fault: Fault | None) -> bool:
            """Read what is sent; False if the connection ends before it is whole."""
            size = int(request.headers.get("content-length", 0))
            cut = fault is not None and fault.cut is not None and request.method != "GET"
            stop = int(size * fault.cut) if cut else size
            pieces = bytearray()
            while len(pieces) < stop:
                piece = self.rfile.read(min(_CHUNK, stop - len(pieces)))
                if not piece:
                    break
                server.wait_for_turn(len(piece))
                pieces += piece
            request.body = bytes(pieces)
            if cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return not cut

        def _send(self, request: Request, answer: Answer, fault: Fault | None) -> None:
            body = memoryview(answer.body)
            status, headers, first = answer.status, dict(answer.headers), 0
            if answer.file is not None:
                body = memoryview(answer.file.data)
                span = (
                    _span(request.headers.get("range"), len(body))
                    if answer.ranges and server.ranges
                    else None
                )
                if span == "unsatisfiable":
                    status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", memoryview(b"")
                elif isinstance(span, tuple):
                    first, stop = span
                    headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
                    status, body = 206, body[first:stop]
            if fault is not None and fault.flip is not None and first <= fault.flip < first + len(body):
                changed = bytearray(body)
                changed[fault.flip - first] ^= 0x10
                body = memoryview(changed)
            request.status = status
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if request.method == "HEAD":
                return
            stop = len(body) if fault is None or fault.cut is None else int(len(body) * fault.cut)
            for at in range(0, stop, _CHUNK):
                piece = body[at : min(stop, at + _CHUNK)]
                server.wait_for_turn(len(piece))
                self.wfile.write(piece)
                request.sent += len(piece)
            if stop < len(body):
                self.wfile.flush()
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _span(header: str | None, size: int) -> tuple[int, int] | str | None:
    """``(start, stop)`` of a Range header."""
    if header is None or not header.startswith("bytes="):
        return None
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    if int(first) >= size:
        return "unsatisfiable"
    return int(first), min(size, int(last) + 1 if last else size)
