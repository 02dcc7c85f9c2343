"""``glmquant serve`` as a process: what it admits, how it ends, what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from helpers_serve import tiny_folder

from glmquant.checkpoint.source import open_folder
from glmquant.cli import main
from glmquant.errors import DoesNotFitError, UsageError
from glmquant.memory import Model
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


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_what_runs_and_ends(number: int) -> None:
    with serving("--max-batch", "1", "--context", "4000", "--device", "cpu") as (process, address, lines):
        body = {**GOOD, "stream": True, "temperature": 2.0, "top_p": 1.0, "seed": 1}
        long = {"prompt": [5] * 3, "max_tokens": 300, "stream": True, "temperature": 1e-3}
        with httpx.stream("POST", address + "/v1/completions", json=long, timeout=120) as stream:
            text = stream.iter_lines()
            next(text)
            process.send_signal(number)
            while httpx.get(address + "/health").json()["status"] == "ok":
                time.sleep(0.01)
            refused = httpx.post(address + CHAT, json=body)
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
        long = {"prompt": [5] * 3, "max_tokens": 3900, "stream": True, "temperature": 1e-3}
        with contextlib.suppress(httpx.TransportError), httpx.stream(
            "POST", address + "/v1/completions", json=long, timeout=120
        ) as stream:  # fmt: skip
            next(stream.iter_lines())
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            stream.read()
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


def test_resident_memory_stays_within_the_plan() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc here")
    with serving("--max-batch", "8", "--context", "2048", "--device", "cpu", OMP_NUM_THREADS="1") as (
        process,
        address,
        _,
    ):
        planned = float(re.search(r"memory_planned_bytes (\S+)", httpx.get(address + "/metrics").text)[1])  # type: ignore[index]
        body = {"prompt": [[5] * 1500][0], "max_tokens": 30, "temperature": 1.0}
        threads = [
            threading.Thread(
                target=httpx.post, args=(address + "/v1/completions",), kwargs={"json": body, "timeout": 300}
            )
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    assert resident <= planned


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
            ((str(tmp_path), "--port", "0"), "config.json"),
        ):  # fmt: skip
            result = CliRunner().invoke(main, ["serve", *options, "--device", "cpu"])
            assert result.exit_code == 2, result.output
            assert says in result.output
            assert "Traceback" not in result.output


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
        r"one request of \d+ tokens needs .* of memory, and --vram is 0.10 GiB; lower --context",
        result.output,
    )


@pytest.fixture(scope="module")
def glm3() -> Model:
    return Model.of_checkpoint(open_folder(tiny_folder("chatglm3-6b")))


def test_slots_are_what_fits(glm3: Model) -> None:
    whole = admit(glm3, "cuda", vram=8 << 30, context=1024, max_batch=6)
    assert whole.slots == 6
    for slots in range(1, 7):
        fitting = admit(glm3, "cuda", vram=admit(glm3, "cuda", vram=8 << 30, context=1024, max_batch=slots).memory.peak,
                        context=1024, max_batch=6)  # fmt: skip
        assert fitting.slots == slots
    with pytest.raises(DoesNotFitError):
        admit(glm3, "cuda", vram=whole.memory.resident, context=1024)
    with pytest.raises(UsageError):
        admit(glm3, "cuda", vram=8 << 30, context=10**6)


def test_chatglm_6b_has_one_slot() -> None:
    model = Model.of_checkpoint(open_folder(tiny_folder("chatglm-6b")))
    admission = admit(model, "cpu", vram=8 << 30, max_batch=9)
    assert (admission.slots, admission.chunk, admission.context) == (1, None, 2048)
