"""What is free, and whose places in the queue are whose, before the model is asked anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers_serve import listening, real_service, scripted, service_of, tiny_folder, until

from glmquant.checkpoint.source import open_folder
from glmquant.memory import Model
from glmquant.serve import admission, guard
from glmquant.serve.service import Service, Ticket

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
GIB = 1 << 30


def groups(root: Path, membership: str, folders: dict[str, tuple[int | str, int, int]]) -> Path:
    """A file system with control groups: folder -> limit, usage, inactive pages of files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, (limit, usage, files) in folders.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        older = name.startswith("memory")
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if older else ("memory.max", "memory.current")
        )
        for file, value in zip(names, (limit, usage), strict=True):
            (folder / file).write_text(f"{value}\n")
        inactive = "total_inactive_file" if older else "inactive_file"
        (folder / "memory.stat").write_text(f"anon 5\n{inactive} {files}\n")
    return root


@pytest.mark.parametrize(
    ("membership", "folders", "free"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"": (4 * GIB, GIB, 0)}, 3 * GIB),
        ("0::/\n", {"": ("max", GIB, 0)}, None),
        ("0::/a/b\n", {"a": (2 * GIB, GIB, 0), "a/b": ("max", 5, 0)}, GIB),
        ("0::/a/b\n", {"a": (9 * GIB, GIB, 0), "a/b": (3 * GIB, GIB, 0)}, 2 * GIB),
        ("0::/outside/name\n", {"": (4 * GIB, 3 * GIB, GIB)}, 2 * GIB),
        ("0::/\n", {"": (GIB, 2 * GIB, 0)}, 0),
        ("3:cpu:/x\n4:memory:/x\n0::/\n", {"memory/x": (4 * GIB, GIB, GIB)}, 4 * GIB),
        ("4:cpu,memory:/host/name\n", {"memory": (4 * GIB, GIB, 0)}, 3 * GIB),
    ],
)
def test_what_a_container_has_free(
    tmp_path: Path, membership: str, folders: dict[str, Any], free: int | None
) -> None:
    assert admission.free_of_container(groups(tmp_path, membership, folders)) == free


def test_a_container_s_limit_is_what_is_admitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert admission.free_of_container(tmp_path) is None
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm3-6b")))
    monkeypatch.setattr(admission, "_free_of_machine", lambda: 5000 * GIB)
    monkeypatch.setattr(admission, "free_of_container", lambda: 4000 * GIB)
    assert admission.admit(model, "cpu").limit == 4000 * GIB


def test_each_gpu_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 10 * GIB, 1: 20 * GIB}
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device=None: (free[(device and device.index) or 0], 0)
    )
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm3-6b")))
    assert admission.admit(model, "cuda").limit == 10 * GIB
    assert admission.admit(model, "cuda:1").limit == 20 * GIB


@pytest.mark.parametrize("context", [2, 3, 6])
def test_the_shortest_contexts(context: int) -> None:
    service = real_service("chatglm3-6b", context=context, chunk=context)
    with listening(service) as address:
        answer = httpx.post(address + "/v1/completions", json={"prompt": [5], "max_tokens": 9}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == context - 1


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.2", "127.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_every_spelling_of_this_machine_is_guarded(bind: str) -> None:
    hosts = guard.hosts_of(bind, ["mine"])
    assert hosts is not None
    assert {"localhost", "127.0.0.1", "[::1]", "mine", f"[{bind}]" if ":" in bind else bind} <= hosts


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_other_addresses_have_names_of_their_own(bind: str) -> None:
    assert guard.hosts_of(bind, []) is None


# Places in the queue


class Encoder:
    """Stands before a service's tokenizer, and waits."""

    def __init__(self, service: Service) -> None:
        self.gate, self.texts = threading.Event(), list[object]()
        real = service.prompt_ids

        def encode(prompt: str | list[int]) -> list[int]:
            self.texts.append(prompt)
            assert self.gate.wait(60)
            return real(prompt)

        service.prompt_ids = encode  # type: ignore[method-assign]


@pytest.fixture
def service() -> Service:
    return service_of("chatglm3-6b", scripted("chatglm3-6b", slots=1), queue=1, timeout=30)


@pytest.fixture
def encoder(service: Service) -> Iterator[Encoder]:
    encoder = Encoder(service)
    yield encoder
    encoder.gate.set()


def complete(address: str, prompt: Any = "hello", **options: Any) -> httpx.Response:
    return httpx.post(address + "/v1/completions", json={"prompt": prompt}, **{"timeout": 60, **options})


def test_encoding_has_a_place_in_the_queue(service: Service, encoder: Encoder) -> None:
    with listening(service) as address, ThreadPoolExecutor() as pool:
        asked = [pool.submit(complete, address) for _ in range(2)]
        until(lambda: service.engine.waiting == 2)
        assert complete(address).status_code == 429
        assert complete(address, ["a", "b"]).status_code == 429
        never = complete(address, ["a", "b", "c"])  # waiting would not help
        assert (never.status_code, "retry-after" in never.headers) == (400, False)
        assert "takes 2 prompts" in never.json()["error"]["message"]
        encoder.gate.set()
        assert [each.result().status_code for each in asked] == [200, 200]
        assert complete(address, ["a", "b"]).status_code == 200
    assert service.engine.waiting == 0
    assert len(encoder.texts) == 4


def test_time_runs_while_a_prompt_is_encoded(encoder: Encoder, service: Service) -> None:
    object.__setattr__(service.settings, "timeout", 0.3)
    with listening(service) as address:
        late = complete(address)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        until(lambda: service.engine.waiting == 0)


def test_a_client_that_leaves_is_not_encoded(encoder: Encoder, service: Service) -> None:
    with listening(service) as address:
        for text in ("first", "second"):
            with pytest.raises(httpx.ReadTimeout):
                complete(address, text, timeout=0.3)
        until(lambda: service.engine.waiting == 0)
        encoder.gate.set()
        assert complete(address, "third").status_code == 200
    assert encoder.texts == ["first", "third"]


def test_what_cannot_fit_is_not_encoded(encoder: Encoder, service: Service) -> None:
    with listening(service) as address:
        refused = complete(address, ["short", "x" * 200 * service.context])
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert encoder.texts == []


def test_a_stream_that_nobody_waits_for_gives_its_place_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after the seconds in which an early error still gets a status."""
    monkeypatch.setattr(Ticket.wait, "__defaults__", (1000.0,))
    runner: Any = service.engine._runner
    runner.gate.clear()
    with listening(service) as address, ThreadPoolExecutor() as pool:
        first = pool.submit(httpx.post, address + CHAT, json={"messages": USER}, timeout=60)
        until(lambda: service.engine.running == 1)
        jobs = service.engine._waiting
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + CHAT, json={"messages": USER, "stream": True}, timeout=0.3)
        until(lambda: jobs[0].cancelled)
        runner.gate.set()
        assert first.result().status_code == 200


def test_a_failed_engine_is_told_by_health() -> None:
    runner = scripted("chatglm3-6b")
    runner.poison = 0
    service = service_of("chatglm3-6b", runner)
    with listening(service) as address:
        for _ in range(3):
            assert complete(address, [0, 1]).status_code == 500
        until(lambda: service.engine.failed)
        health = httpx.get(address + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert complete(address, [1, 2]).status_code == 500


def test_usage_does_not_tell_what_others_asked() -> None:
    with listening(real_service("chatglm3-6b")) as address:
        for _ in range(2):
            assert set(complete(address, "the same words").json()["usage"]) == {
                "prompt_tokens", "completion_tokens", "total_tokens"
            }  # fmt: skip
        metrics = httpx.get(address + "/metrics").text
    assert "glmquant_reused_prompt_tokens_total" in metrics
    assert "glmquant_reused_prompt_tokens_total 0.0" not in metrics
