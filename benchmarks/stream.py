"""Convert while downloading, against downloading first and converting then: seconds, peak disk, peak memory.

The hub is on this machine and sends at a fixed rate, to the real client of Hugging Face. Disk is what lies in the
folder of the work, looked at twenty times a second: the client's cache, the fetched files, OUT.

    python -m benchmarks.stream [--layers 8] [--rate 125] [--trials 3] [--out results.json]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure, synthetic
from glmquant.bench import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub import HubServer

_PERIOD_S = 0.05
_NAME = "bench/model"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=synthetic.MODELS, default="chatglm3-6b")
    parser.add_argument("--layers", type=int, default=8, help="only the first N layers (8 make 4.3 GB)")
    parser.add_argument("--shards", type=int, default=7)
    parser.add_argument("--rate", type=float, default=125, help="MB per second that the hub sends")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmquant-bench-stream")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    source = options.folder / f"{options.model}-{options.layers}-{options.shards}"
    if not source.exists():
        synthetic.build(source, options.model, options.layers, options.shards)
    _read(source)  # the disk of the hub is none of what is measured
    with HubServer() as server:
        commit = server.add(_NAME).commit_folder(source)
        server.rate = options.rate * 1e6
        trials = [_trial(server, options.folder / "work") for _ in range(options.trials)]
    names = list(trials[0])
    summary = {
        name: {key: statistics.median(t[name][key] for t in trials) for key in trials[0][name]}
        for name in names
    }
    largest = sorted(p.stat().st_size for p in source.glob("*.safetensors"))[-2:]
    result = {
        "benchmark": "stream",
        "model": f"{options.model}, {options.layers} layers, {options.shards} shards",
        "source_bytes": sum(p.stat().st_size for p in source.iterdir()),
        "two_largest_shards": sum(largest),
        "rate_bytes_per_second": server.rate,
        "commit_of_source": commit,
        "median": summary,
        "trials": trials,
        **environment.describe(),
    }
    for name in names:
        found = summary[name]
        print(
            f"{name:<22} {found['seconds']:7.1f} s   peak disk {found['peak_disk'] / 2**30:5.2f} GiB   "
            f"peak memory {found['peak_memory'] / 2**20:6.0f} MiB   output {found['output'] / 2**30:5.2f} GiB"
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _read(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _trial(server: HubServer, work: Path) -> dict[str, dict[str, float]]:
    cli = [sys.executable, "-m", "glmquant.cli"]
    ref = f"hf:{_NAME}"
    streamed = _measured(server, work, [[*cli, "convert", ref, str(work / "out")]])
    kept = str(work / "source")
    both = [[*cli, "download", ref, "--local-dir", kept], [*cli, "convert", kept, str(work / "out")]]
    first = _measured(server, work, both[:1])
    then = _measured(server, work, both[1:], fresh=False)
    total = {
        "seconds": first["seconds"] + then["seconds"],
        "peak_disk": max(first["peak_disk"], then["peak_disk"]),
        "peak_memory": max(first["peak_memory"], then["peak_memory"]),
        "output": then["output"],
    }
    shutil.rmtree(work)
    return {"streamed": streamed, "download": first, "convert": then, "download then convert": total}


def _measured(
    server: HubServer, work: Path, commands: Sequence[Sequence[str]], *, fresh: bool = True
) -> dict[str, float]:
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    os.environ.update(
        HF_ENDPOINT=server.url,
        HF_HOME=str(work / "hf"),
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1,localhost",
    )
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(_PERIOD_S):
            peak = max(peak, _on_disk(work))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = [measure.run(command) for command in commands]
    finally:
        over.set()
        watcher.join()
    return {
        "seconds": sum(f.seconds for f in found),
        "peak_disk": max(peak, _on_disk(work)),
        "peak_memory": max(f.peak_anonymous_bytes for f in found),
        "output": _on_disk(work / "out"),
    }


def _on_disk(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


if __name__ == "__main__":
    main()
