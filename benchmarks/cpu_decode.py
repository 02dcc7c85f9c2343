"""Tokens per second on a CPU: glmquant's INT4 and INT8, bf16, and llama.cpp's Q4_0 and Q8_0, in one run.

Every peer has a process of its own, and they take turns. The embedding and the output head are 16-bit for all of them,
threads as many. Beside every round the machine's read bandwidth is measured, on ordinary memory and in huge pages.

    python -m benchmarks.cpu_decode --llama PYTHON [--source synthetic FOLDER ...] [--trials 5] [--out FILE]

``synthetic`` is layers of --model's shapes, by default 8 of ChatGLM3-6B; a FOLDER is a real checkpoint, as the stand-in
of `benchmarks.standin`. Each has results of its own. PYTHON is a Python that has llama-cpp-python, built for this
processor; without it llama.cpp is left out. Needs the disk for the checkpoints and what is made of them (8 layers of
ChatGLM3-6B: 11 GB), and memory for all peers of one at once (12 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import glmquant
from glmquant import Recipe
from glmquant._pages import in_huge_pages
from glmquant.bench import environment

from . import gguf_writer, synthetic

RESULTS = Path(__file__).parent / "results"
_SYNTHETIC = "synthetic"
PREFILL, CONTEXT = 256, 512
_READ_BYTES = 1 << 29


class Peer:
    """A worker: takes ``what number ...`` on a line, answers with seconds."""

    def __init__(self, command: list[str], threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=env, **pipes)  # type: ignore[call-overload]
        self.description: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._process.args)} ended without an answer")
        return json.loads(line)

    def ask(self, *words: object) -> float:
        """Seconds that it took."""
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=synthetic.MODELS, default="chatglm3-6b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--source", nargs="+", default=[_SYNTHETIC], help="synthetic, or folders of checkpoints"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmquant-bench")
    parser.add_argument("--llama", help="Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--new", type=int, default=24, help="tokens to decode in a trial")
    parser.add_argument("--only", nargs="+", help="peers to run")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cpu-decode.json", help="what it has of others is kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.source:
        source = Path(name)
        if name == _SYNTHETIC:
            source = options.folder / f"{options.model}-{options.layers}-layers"
            synthetic.build(source, options.model, options.layers)
        result = _measure(source, options)
        print(json.dumps(result["summary"], indent=1))
        known: dict[str, Any] = {"benchmark": "cpu-decode", "models": {}}
        if options.out.exists():
            known = json.loads(options.out.read_text())
        known["models"][source.resolve().name] = result
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    print(options.out)


def _measure(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    peers = _peers(source, options)
    trials = _trials(peers, options.trials, options.new)
    for peer in peers.values():
        peer.close()
    descriptions = {name: peer.description for name, peer in peers.items()}
    return {
        "threads": options.threads,
        **environment.describe(),
        "peers": descriptions,
        "summary": summarize(trials, descriptions),
        "trials": trials,
    }


def _peers(source: Path, options: argparse.Namespace) -> dict[str, Peer]:
    def ours(name: str, recipe: Recipe | None, dtype: str) -> list[str]:
        out = source
        if recipe is not None:
            out = options.folder / f"{source.name}-{name}"
            if not out.exists():
                glmquant.convert(source, out, recipe)
        command = [sys.executable, "-m", "benchmarks.glmquant_worker", str(out)]
        return [*command, str(options.threads), dtype]

    def llama(kind: str) -> list[str]:
        file = gguf_writer.write(source, options.folder / f"{source.name}-{kind.lower()}-gguf", kind)
        worker = Path(__file__).with_name("llama_worker.py")
        return [options.llama, str(worker), str(file), str(options.threads), str(CONTEXT)]

    makers: dict[str, Callable[[], list[str]]] = {
        "int4": lambda: ours("int4", Recipe(bits=4, method="rtn"), "float16"),
        "int8": lambda: ours("int8", Recipe(bits=8, method="rtn"), "float16"),
        "bf16": lambda: ours("bf16", None, "bfloat16"),
    }
    if options.llama:
        makers |= {"llama.cpp Q4_0": lambda: llama("Q4_0"), "llama.cpp Q8_0": lambda: llama("Q8_0")}
    wanted = options.only or list(makers)
    return {name: Peer(make(), options.threads) for name, make in makers.items() if name in wanted}


def _trials(peers: dict[str, Peer], count: int, new: int) -> list[dict[str, Any]]:
    tasks = {"prefill": ("prefill", PREFILL), "decode 1": ("decode", 1, new), "decode 4": ("decode", 4, new)}
    tokens = {"prefill": PREFILL, "decode 1": new, "decode 4": 4 * new}
    for peer in peers.values():  # warm up
        peer.ask("decode", 1, 2)
    memory = {
        "pages of 4 KiB": torch.empty(_READ_BYTES // 8, dtype=torch.int64),
        "huge pages": in_huge_pages(torch.empty(_READ_BYTES // 8, dtype=torch.int64)),
    }
    for buffer in memory.values():
        buffer.fill_(1)
    trials = []
    names = list(peers)
    for number in range(count):
        for task, words in tasks.items():
            for kind, buffer in memory.items():
                trials.append({"trial": number, "task": task, "read": kind, "gb_per_second": _read(buffer)})
            shift = number % len(names)  # nobody always follows the same one
            for name in names[shift:] + names[:shift]:
                seconds = peers[name].ask(*words)
                trial = {"trial": number, "task": task, "peer": name, "seconds": round(seconds, 4)}
                trials.append(trial | {"tokens_per_second": round(tokens[task] / seconds, 2)})
                print(json.dumps(trials[-1]), flush=True)
    return trials


def _read(buffer: torch.Tensor) -> float:
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - started))
    return round(best / 1e9, 1)


def summarize(trials: list[dict[str, Any]], peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians, the ratios to llama.cpp in the same round, and how fast the weights were read."""
    speeds = {(t["peer"], t["task"], t["trial"]): t["tokens_per_second"] for t in trials if "peer" in t}
    tasks = list(dict.fromkeys(t["task"] for t in trials))
    rounds = sorted({t["trial"] for t in trials})

    def median(peer: str, task: str) -> float:
        return float(statistics.median(speeds[peer, task, n] for n in rounds))

    def reads(kind: str) -> float:
        return float(statistics.median(t["gb_per_second"] for t in trials if t.get("read") == kind))

    summary: dict[str, Any] = {
        "tokens_per_second": {peer: {task: round(median(peer, task), 1) for task in tasks} for peer in peers},
        "read_gb_per_second": {kind: reads(kind) for kind in ("pages of 4 KiB", "huge pages")},
    }
    for ours, theirs in (("int4", "llama.cpp Q4_0"), ("int8", "llama.cpp Q8_0")):
        if ours in peers and theirs in peers:
            summary[f"{ours} / {theirs}"] = {
                task: round(
                    statistics.median(speeds[ours, task, n] / speeds[theirs, task, n] for n in rounds), 2
                )
                for task in tasks
            }
    for peer, description in peers.items():
        if "bytes_per_token" in description:
            rate = description["bytes_per_token"] * median(peer, "decode 1") / 1e9
            summary[f"{peer}, weights read at batch 1"] = {
                "gb_per_second": round(rate, 1),
                **{
                    f"of reading {kind}": round(rate / value, 2)
                    for kind, value in summary["read_gb_per_second"].items()
                },
            }
    return summary


if __name__ == "__main__":
    main()
