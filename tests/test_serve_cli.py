"""``glmquant serve`` as a process: what it admits, how it ends, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from helpers_cards import CONFIGS
from helpers_serve import tiny_folder, until

from glmquant import families
from glmquant.checkpoint.source import open_folder
from glmquant.cli import main
from glmquant.errors import DoesNotFitError, UsageError
from glmquant.families import Role
from glmquant.memory import Held, Model
from glmquant.serve import admission
from glmquant.serve.admission import admit

CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "hello"}]}


@contextlib.contextmanager
def serving(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server as a process, its address, and the lines that it prints."""
    command = [
        sys.executable,
        "-m",
        "glmquant.cli",
        "serve",
        str(tiny_folder("chatglm3-6b")),
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if "started server process" in line.lower():
                found.set()
        found.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert found.wait(180)
        address = re.search(r"listening on (\S+)", "".join(lines))
        assert address, lines
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(address[1] + "/health")
                break
            time.sleep(0.05)
        yield process, address[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def long_answer(address: str, tokens: int = 300) -> dict[str, Any]:
    """A request whose answer is so long; the tiny model's mostly end after a few tokens."""
    for seed in range(500):
        body = {"prompt": [5] * 3, "max_tokens": tokens, "temperature": 100, "top_p": 1, "seed": seed}
        usage = httpx.post(address + "/v1/completions", json=body, timeout=120).json()["usage"]
        if usage["completion_tokens"] == tokens:
            return {**body, "stream": True}
    raise AssertionError("no answer is long enough")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_what_runs_and_ends(number: int) -> None:
    with serving("--max-batch", "1", "--context", "4000", "--device", "cpu") as (process, address, lines):
        long = long_answer(address)
        with httpx.stream("POST", address + "/v1/completions", json=long, timeout=120) as stream:
            text = stream.iter_lines()
            next(text)
            process.send_signal(number)
            while httpx.get(address + "/health").json()["status"] == "ok":
                time.sleep(0.01)
            refused = httpx.post(address + CHAT, json=GOOD)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            *_, last = [line for line in text if line]
            assert last == "data: [DONE]"
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(address + "/health")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_ends_it_at_once() -> None:
    with serving("--context", "4000", "--device", "cpu") as (process, address, _):
        long = long_answer(address)
        with contextlib.suppress(httpx.TransportError), httpx.stream(
            "POST", address + "/v1/completions", json=long, timeout=120
        ) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            list(lines)
        assert process.wait(60) == 0


def test_keys_names_and_what_is_printed() -> None:
    options = ("--name", "mine", "--max-batch", "3", "--context", "128", "--device", "cpu")
    with serving(*options, GLMQUANT_API_KEY="k") as (_, address, lines):
        assert address.startswith("http://127.0.0.1:")
        assert any(line.startswith("mine: 3 requests of 128 tokens at a time, ") for line in lines)
        assert httpx.get(address + "/v1/models").status_code == 401
        models = httpx.get(address + "/v1/models", headers={"Authorization": "Bearer k"}).json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in models] == [("mine", 128)]
        answer = httpx.post(address + CHAT, json=GOOD, headers={"Authorization": "Bearer k"}, timeout=60)
        assert answer.status_code == 200
        assert "hello" not in "".join(lines)  # prompts are nobody's business


def test_prompts_and_answers_are_logged_where_asked() -> None:
    with serving("--log-prompts", "--context", "128", "--device", "cpu") as (_, address, lines):
        assert httpx.post(address + CHAT, json=GOOD, timeout=60).status_code == 200
        until(lambda: any("answered" in line for line in lines))
        assert any("asked" in line and "hello" in line for line in lines)


def test_requests_take_no_more_memory_than_is_planned_for_them() -> None:
    """Less the idle process, whose size is the interpreter's and the libraries'."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("there is no Linux' /proc here")
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm3-6b")))
    memory = admit(model, "cpu", context=2048, max_batch=8).memory
    options = ("--max-batch", "8", "--context", "2048", "--device", "cpu")
    with serving(*options, OMP_NUM_THREADS="1") as (process, address, _):

        def kilobytes(what: str) -> int:
            return int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1])  # type: ignore[index]

        def ask(_: int) -> httpx.Response:
            body = {"prompt": [5] * 1500, "max_tokens": 30, "temperature": 1.0}
            return httpx.post(address + "/v1/completions", json=body, timeout=300)

        planned = float(re.search(r"memory_planned_bytes (\d\S+)", httpx.get(address + "/metrics").text)[1])  # type: ignore[index]
        assert planned == memory.peak
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
        idle = kilobytes("VmRSS")
        with ThreadPoolExecutor(16) as pool:
            assert [answer.status_code for answer in pool.map(ask, range(16))] == [200] * 16
        grown = (kilobytes("VmHWM") - idle) * 1024
    # Python's and uvicorn's own are a part of what is planned for the process.
    assert grown <= memory.cache + memory.activations + memory.slack + (8 << 20)


# What is refused before anything is loaded


def test_bad_usage(tmp_path: Path) -> None:
    folder = str(tiny_folder("chatglm3-6b"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, says in (
            ((folder, "--port", port), "cannot listen on 127.0.0.1"),
            ((folder, "--port", "0", "--host", "192.0.2.1"), "cannot listen"),
            ((folder, "--port", "0", "--api-key", ""), "API key is empty"),
            ((folder, "--port", "0", "--vram", "nothing"), "nothing"),
            ((folder, "--port", "0", "--context", "999999"), "--context 999999"),
            ((str(tmp_path), "--port", "0"), "no weights"),
        ):  # fmt: skip
            result = CliRunner().invoke(main, ["serve", *options, "--device", "cpu"])
            assert result.exit_code == 2, result.output
            assert says in result.output
            assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["chat", "serve", "verify"])
def test_a_folder_that_is_not_there_is_told_before_torch_is_imported(command: str) -> None:
    program = f"""
import sys
from glmquant.cli import main
try:
    main(["{command}", "nosuch"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("glmquant: the folder 'nosuch' does not exist")


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    arguments = [
        "serve",
        str(tiny_folder("chatglm3-6b")),
        "--port",
        "0",
        "--vram",
        "100MiB",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert re.search(
        r"one request of \d+ tokens needs .* of memory, and --vram is 100.00 MiB; lower --context",
        result.output,
    )


def test_slots_are_what_fits() -> None:
    """ChatGLM3-6B, as its published config has it: each slot of 8192 tokens takes 224 MiB."""
    config = json.loads((CONFIGS / "chatglm3-6b.json").read_text())
    family = families.detect(config)
    dims = family.dims(config)
    tensors = (spec for spec in family.tensors(dims) if spec.role is not Role.BUFFER)
    model = Model(family.name, dims, "F16", tuple(Held(t.role, t.shape, None) for t in tensors), 0)
    peaks = [admit(model, "cuda", vram=80 << 30, max_batch=slots).memory.peak for slots in range(1, 7)]
    for slots, peak in enumerate(peaks, 1):
        assert admit(model, "cuda", vram=peak, max_batch=6).slots == slots
        if slots > 1:
            assert peak - peaks[slots - 2] >= 224 << 20
            assert admit(model, "cuda", vram=peak - 1, max_batch=6).slots == slots - 1
    with pytest.raises(DoesNotFitError):
        admit(model, "cuda", vram=peaks[0] - 1)
    with pytest.raises(UsageError):
        admit(model, "cuda", vram=80 << 30, context=10**6)


def test_any_number_of_slots_is_decided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm3-6b")))
    calls: list[Any] = []
    estimate = admission.estimate
    monkeypatch.setattr(admission, "estimate", lambda *args: calls.append(args) or estimate(*args))
    found = admit(model, "cpu", vram=2 << 30, max_batch=10**6)
    assert found.memory.peak <= 2 << 30
    assert admit(model, "cpu", vram=2 << 30, max_batch=found.slots + 1).slots == found.slots > 16
    assert len(calls) < 60


def test_chatglm_6b_has_one_slot() -> None:
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm-6b")))
    found = admit(model, "cpu", vram=8 << 30, max_batch=9)
    assert (found.slots, found.chunk, found.context) == (1, None, 2048)
