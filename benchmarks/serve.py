"""What clients see of ``glmquant serve`` when they are many, and of llama.cpp's server with the same weights.

    python -m benchmarks.serve --source STANDIN --folder DIR --peer PYTHON

For 1, 4, 16 and 64 clients at a time, each with prompts of its own: tokens per second of all together, time to the
first token, time between tokens, and whether every request was answered, and with its own answer. PYTHON is an
interpreter that has ``xllamacpp`` (llama.cpp and its server, built for AVX2; one for newer CPUs would be faster);
without it only our own server is measured. The answers that count as right are those to one client at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

import glmquant
from glmquant import Recipe
from glmquant.bench import environment

from . import gguf_writer

CLIENTS = (1, 4, 16, 64)
CONTEXT, SLOTS = 512, 16
TOPICS = (
    "the sea", "bread", "a bicycle", "winter", "the moon", "an old library", "coffee", "a river", "music", "glass",
    "the desert", "a lighthouse", "chess", "a garden", "the post office", "honey",
)  # fmt: skip
QUESTIONS = (
    "Write a short story about {}.", "Explain {} to a child in three sentences.",
    "List five facts about {} and say which one you find most surprising.",
    "Translate this into simple English and continue it: It was late in the day, and nobody had thought of {} for a "
    "long time, until a letter came.",
)  # fmt: skip
PROMPTS = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
_PEER = """
import sys, time, xllamacpp as xlc
model, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xlc.CommonParams()
params.model.path, params.port = model, port
params.n_parallel, params.n_ctx, params.cont_batching = slots, slots * context, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xlc.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


@dataclass(frozen=True)
class Reply:
    """What one request saw; seconds."""

    text: str
    tokens: int
    first: float
    gaps: list[float]
    whole: float


@dataclass(frozen=True)
class Row:
    """A number of clients at one server."""

    server: str
    clients: int
    requests: int
    seconds: float
    tokens: int
    tokens_per_second: float
    first_token_median: float
    first_token_worst: float
    between_tokens_median: float
    between_tokens_99: float
    lost: int
    same: int
    mixed_up: int


async def _ask(client: httpx.AsyncClient, prompt: str, new: int) -> Reply:
    body = {
        "model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": new, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started = time.perf_counter()
    times: list[float] = []
    text, tokens = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    text += piece
                    times.append(time.perf_counter())
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    whole = time.perf_counter() - started
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return Reply(text, tokens, times[0] - started if times else whole, gaps, whole)


async def _load(address: str, prompts: Sequence[str], clients: int, new: int) -> list[Reply | None]:
    """The replies to `prompts`, asked by so many clients that each ask one after the other; None is lost."""
    replies: list[Reply | None] = [None] * len(prompts)
    waiting = list(enumerate(prompts))[::-1]
    # A connection for every request: servers close those that have been idle, or used often, whenever they like.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as connection:
            while waiting:
                number, prompt = waiting.pop()
                try:
                    replies[number] = await _ask(connection, prompt, new)
                except (httpx.HTTPError, RuntimeError) as error:
                    print(f"request {number} was lost: {error!r}", file=sys.stderr)

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


def _topic(number: int) -> str:
    return TOPICS[number % len(TOPICS)].split()[-1]


def _row(
    server: str, clients: int, seconds: float, replies: Sequence[Reply | None], right: dict[int, str]
) -> Row:
    there = [reply for reply in replies if reply is not None]
    gaps = sorted(gap for reply in there for gap in reply.gaps)
    firsts = [reply.first for reply in there]
    tokens = sum(reply.tokens for reply in there)
    # Rounding may let two likely tokens change places, so an answer that differs is only wrong if it is another's.
    same = sum(reply is not None and reply.text == right.get(n) for n, reply in enumerate(replies))
    mixed = 0
    for number, reply in enumerate(replies):
        # A text that names no topic may well be what both come to: rounding depends on who else is there.
        if reply is not None and reply.text != right.get(number):
            others = {m for m, text in right.items() if m != number and text == reply.text}
            if any(_topic(other) in reply.text for other in others):
                mixed += 1
                print(f"{PROMPTS[number]!r} got another's answer: {reply.text!r}", file=sys.stderr)
    return Row(
        server, clients, len(replies), round(seconds, 3), tokens, round(tokens / seconds, 2),
        round(statistics.median(firsts), 4), round(max(firsts), 4), round(statistics.median(gaps), 4),
        round(gaps[int(0.99 * len(gaps))], 4), len(replies) - len(there), same, mixed,
    )  # fmt: skip


@contextlib.contextmanager
def _process(command: Sequence[str], port: int, threads: int, log: Path) -> Iterator[str]:
    """The address of a server, once it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    name: str, command: list[str], port: int, options: Any, right: dict[int, str] | None
) -> tuple[list[Row], dict[int, str]]:
    """The rows of a server; `right` are its answers to one client, which are found first where they are None."""
    rows = []
    with _process(command, port, options.threads, options.folder / f"{name}.log") as address:
        asyncio.run(_load(address, PROMPTS[:2], 1, 4))  # what is compiled at first use
        if right is None:
            replies = asyncio.run(_load(address, PROMPTS, 1, options.new))
            right = {n: reply.text for n, reply in enumerate(replies) if reply is not None}
        for clients in CLIENTS:
            count = min(len(PROMPTS), max(options.fewest, 2 * clients))
            started = time.perf_counter()
            replies = asyncio.run(_load(address, PROMPTS[:count], clients, options.new))
            rows.append(_row(name, clients, time.perf_counter() - started, replies, right))
            print(json.dumps(asdict(rows[-1])), flush=True)
    return rows, right


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the stand-in, wide, float16")
    parser.add_argument("--folder", type=Path, required=True, help="for converted files, answers and logs")
    parser.add_argument("--peer", help="Python with xllamacpp")
    parser.add_argument("--only", choices=["glmquant", "llama.cpp"])
    parser.add_argument(
        "--bits", type=int, choices=(4, 16), default=4, help="INT4 and Q4_0, or 16-bit weights"
    )
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--fewest", type=int, default=8, help="requests of a row, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--answers", action="store_true", help="only find the right answers; needs no quiet machine"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.json"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = (
        json.loads(options.out.read_text())["rows"] if options.only and options.out.exists() else []
    )
    rows = [row for row in rows if isinstance(row, dict) and row["server"] != options.only]
    for name in ("glmquant", "llama.cpp"):
        if options.only not in (None, name) or (name == "llama.cpp" and not options.peer):
            continue
        port = _free_port()
        if name == "glmquant":
            command = [sys.executable, "-m", "glmquant.cli", "serve", str(_ours(options)), "--dtype", "float16",
                       "--port", str(port), "--context", str(CONTEXT), "--max-batch", str(SLOTS)]  # fmt: skip
        else:
            kind = "F16" if options.bits == 16 else "Q4_0"
            model = gguf_writer.write(options.source, options.folder / f"standin-{kind.lower()}-gguf", kind)
            command = [
                options.peer,
                "-c",
                _PEER,
                str(model),
                str(port),
                str(options.threads),
                str(SLOTS),
                str(CONTEXT),
            ]
        known = options.folder / f"{name}-{options.bits}-bit-{options.new}-answers.json"
        right = (
            {int(n): text for n, text in json.loads(known.read_text()).items()} if known.exists() else None
        )
        if options.answers:
            with _process(command, port, options.threads, options.folder / f"{name}.log") as address:
                replies = asyncio.run(_load(address, PROMPTS, 1, options.new))
            known.write_text(json.dumps({n: reply.text for n, reply in enumerate(replies) if reply}))
            continue
        found, _ = measure(name, command, port, options, right)
        rows += found
    if options.answers:
        return
    document = {
        "benchmark": "serve",
        **environment.describe(),
        "threads": options.threads,
        "model": "SmolLM2-135M-Instruct as a ChatGLM3 checkpoint (wide, 379 M weights)",
        "weights": "16 bit" if options.bits == 16 else "INT4 in groups of 128; Q4_0; head and embedding 16 bit",
        "peer": "llama.cpp's server in xllamacpp, built for AVX2" if options.peer else None,
        "slots": SLOTS, "context": CONTEXT, "new_tokens": options.new,
        "rows": [row if isinstance(row, dict) else asdict(row) for row in rows],
    }  # fmt: skip
    options.out.write_text(json.dumps(document, indent=1) + "\n")


def _ours(options: argparse.Namespace) -> Path:
    if options.bits == 16:
        return Path(options.source)
    out: Path = options.folder / "standin-int4"
    if not out.exists():
        glmquant.convert(options.source, out, Recipe(bits=4))
    return out


if __name__ == "__main__":
    main()
