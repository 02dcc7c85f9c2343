"""Broken, hostile, slow and impatient clients; and very many of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from helpers_serve import listening, scripted, service_of

from glmquant.serve import guard
from glmquant.serve.service import Service

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
GOOD = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def service() -> Service:
    runner = scripted("chatglm3-6b", lambda prompt: "\n" + prompt.split()[-1].split("<")[0], slots=8)
    return service_of("chatglm3-6b", runner, queue=2000)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with listening(service, max_body=100_000) as address:
        yield address


@pytest.fixture(autouse=True)
def _still_well(address: str, service: Service) -> Iterator[None]:
    """Whatever a test does, the next good request is answered, and nothing is left running."""
    yield
    assert (
        httpx.post(address + CHAT, json=GOOD, timeout=60).json()["choices"][0]["message"]["content"]
        == "hello"
    )
    deadline = time.monotonic() + 30
    while not service.engine.idle:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe\x00", b'{"prompt": "\xff"}', b"[" * 50_000, b'{"a":' * 9000,
     b"NaN", b'{"temperature": NaN, "prompt": "x", "messages": []}', b"1" * 5000, b"{}", b'{"prompt": "'],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_bodies_that_are_no_requests(address: str, path: str, body: bytes) -> None:
    response = httpx.post(address + path, content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_only_json_is_taken(address: str, kind: str) -> None:
    """A form on any page on the internet could send the others to 127.0.0.1 unasked."""
    response = httpx.post(address + CHAT, content=json.dumps(GOOD), headers={"Content-Type": kind})
    assert response.status_code == 415


def test_giant_bodies(address: str) -> None:
    stated = httpx.post(address + CHAT, content=b"x" * 100_001, headers=JSON)
    assert (stated.status_code, stated.json()["error"]["code"]) == (413, "request_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 10_000

    with contextlib.suppress(
        httpx.WriteError
    ):  # the connection may close before the answer is read, says HTTP
        assert httpx.post(address + CHAT, content=endless(), headers=JSON).status_code == 413
    with socket.create_connection(_place(address)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 99999999999999\r\n\r\n")  # fmt: skip
        assert b" 413 " in connection.recv(65536)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").partition(":")
    return host, int(port)


def test_a_slow_body_is_waited_for_but_not_for_ever(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(GOOD).encode()

    def dripping() -> Iterator[bytes]:
        for place in range(0, len(body), 9):
            time.sleep(0.01)
            yield body[place : place + 9]

    assert httpx.post(address + CHAT, content=dripping(), headers=JSON).status_code == 200
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.3)
    with socket.create_connection(_place(address)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 20\r\n\r\n{")  # fmt: skip
        assert b" 408 " in connection.recv(65536)


def test_clients_that_leave(address: str, service: Service) -> None:
    """In the middle of a stream, while they wait, in the middle of their own body: their slots become free."""
    runner: Any = service.engine._runner
    before, runner.answer, runner.delay = runner.answer, lambda ids: [5] * 400, 0.1
    try:
        with httpx.stream("POST", address + CHAT, json={**GOOD, "stream": True}) as response:
            next(response.iter_lines())
            assert service.engine.running == 1
        for _ in range(12):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(address + CHAT, json=GOOD, timeout=0.3)
        with socket.create_connection(_place(address)) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 20\r\n\r\n{")  # fmt: skip
        deadline = time.monotonic() + 30  # all of their answers would take 40 s and more
        while not service.engine.idle:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        runner.answer, runner.delay = before, 0.0


def test_a_client_that_reads_slowly_holds_up_nobody(address: str) -> None:
    with httpx.stream("POST", address + CHAT, json={**GOOD, "stream": True}) as slow:
        for _ in range(20):
            assert httpx.post(address + CHAT, json=GOOD).status_code == 200
        slow.read()
        assert slow.text.endswith("data: [DONE]\n\n")


def test_a_thousand_quick_requests_and_nobody_gets_another_s_answer(address: str) -> None:
    async def main() -> list[str]:
        # Not by the client's own limit: what waits there costs it quadratic time.
        turn = asyncio.Semaphore(100)
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:

            async def one(number: int) -> str:
                messages = [{"role": "user", "content": f"n{number}"}]
                async with turn:
                    answer = await client.post(CHAT, json={"messages": messages})
                return answer.json()["choices"][0]["message"]["content"]

            return await asyncio.gather(*map(one, range(1000)))

    assert asyncio.run(main()) == [f"n{number}" for number in range(1000)]


def test_good_requests_among_bad_ones(address: str) -> None:
    def one(number: int) -> int:
        if number % 3 == 0:
            return httpx.post(address + CHAT, content=b"{" * number, headers=JSON, timeout=60).status_code
        if number % 3 == 1:
            return httpx.post(address + "/v1/completions", json={"prompt": [10**9]}, timeout=60).status_code
        return httpx.post(address + CHAT, json=GOOD, timeout=60).status_code

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(90))) == [400, 400, 200] * 30


def test_garbage_on_the_socket(address: str) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/x.9\r\n\r\n", b"\x00" * 1000):
        with socket.create_connection(_place(address)) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in connection.recv(65536)


def test_methods_and_paths(address: str) -> None:
    for method, path, status in (("PUT", "/", 405), ("GET", CHAT, 405), ("GET", "/../../etc/passwd", 404),
                                 ("GET", "/docs", 404), ("DELETE", "/v1/models", 405)):  # fmt: skip
        response = httpx.request(method, address + path)
        assert (response.status_code, list(response.json())) == (status, ["error"])


def test_pages_elsewhere_cannot_ask() -> None:
    """No CORS unless asked for, and no other name for a server that only this machine reaches."""
    service = service_of("chatglm3-6b", scripted("chatglm3-6b"))
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with listening(service, hosts=guard.hosts_of("127.0.0.1", [])) as address:
        assert (
            "access-control-allow-origin" not in httpx.post(address + CHAT, json=GOOD, headers=origin).headers
        )
        assert httpx.options(address + CHAT, headers=origin).status_code == 405
        rebound = httpx.post(address + CHAT, json=GOOD, headers={"Host": "evil.example"})
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "unknown_host")
        for name in ("localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:80"):
            assert httpx.get(address + "/health", headers={"Host": name}).status_code == 200
    service = service_of("chatglm3-6b", scripted("chatglm3-6b"))
    with listening(service, cors=["https://mine.example"]) as address:
        for name, allowed in (("https://mine.example", True), ("https://evil.example", False)):
            headers = httpx.options(address + CHAT, headers={**origin, "Origin": name}).headers
            assert (headers.get("access-control-allow-origin") == name) is allowed
    assert guard.hosts_of("0.0.0.0", []) is None
    assert guard.hosts_of("127.0.0.1", ["*"]) is None
    assert "mine" in (guard.hosts_of("::1", ["mine"]) or ())


def test_what_the_description_allows_is_never_a_crash(address: str) -> None:
    """schemathesis makes requests from the OpenAPI description; every answer is one that it describes."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=25,
            # Each example is a request: making a failing one smaller would take minutes.
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case: Any) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500 or response.status_code == 503
            case.validate_response(response, excluded_checks=_not_ours(schemathesis))

        check()
    assert operations >= 8


def _not_ours(schemathesis: Any) -> list[Any]:
    """Checks that do not fit: what is neutral, null or extra is taken where the description cannot say so."""
    checks = schemathesis.checks
    return [getattr(checks, name) for name in ("positive_data_acceptance",) if hasattr(checks, name)]
