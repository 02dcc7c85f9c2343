"""Run every section in a process of its own and write one JSON document, as results come in.

    python -m benchmarks.gpu [--only SECTION ...] [--seconds N] [--tests STATUS] [--out FILE]

A section that fails, or takes too long, is recorded with what it gave until then and what it said; others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
# The most that each may take, in seconds; together they may take less (--seconds), so what matters most comes first.
LIMITS = {
    "bandwidth": 40, "matmul": 150, "end_to_end": 140, "convert": 100, "memory": 100, "kernels": 40,
}  # fmt: skip
_PERIOD = 0.5  # seconds between looks at a section
_LINES = 30  # of what a failing section said


def main() -> int:
    """See the module; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="for all sections together")
    parser.add_argument("--tests", type=int, help="exit status of the GPU tests, to be recorded")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU: only to see that this program works"
    )
    parser.add_argument(
        "--section", help=argparse.SUPPRESS
    )  # to be run here, its results to go into --folder
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        _run_here(options.section, options.folder, options.dry)
        return 0
    import torch

    from glmquant.bench import environment

    if not options.dry and not torch.cuda.is_available():
        print("there is no GPU here.", file=sys.stderr)
        return 2
    document: dict[str, Any] = {
        "benchmark": "gpu", **environment.describe(), "cuda": torch.version.cuda, "tests_status": options.tests,
    }  # fmt: skip
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="glmquant-gpu-bench-", ignore_cleanup_errors=True) as folder:
        for name in options.only or LIMITS:
            limit = min(LIMITS[name], deadline - time.monotonic())
            for found in _run_beside(name, limit, Path(folder), options.dry):
                document[name] = found
                options.out.write_text(json.dumps(document, indent=1) + "\n")
            print(json.dumps({name: document[name]}), flush=True)
    print(options.out)
    return 1 if any("failed" in document[name] for name in options.only or LIMITS) else 0


def _run_here(name: str, folder: Path, dry: bool) -> None:
    from . import convert, end_to_end, matmul, quantize

    sections: dict[str, Callable[[bool, Path], Iterator[dict[str, Any]]]] = {
        "bandwidth": quantize.bandwidth, "matmul": matmul.measure, "end_to_end": end_to_end.measure,
        "convert": convert.measure, "memory": end_to_end.measure_memory, "kernels": quantize.kernels,
    }  # fmt: skip
    with (folder / f"{name}.rows").open("w") as rows:
        for row in sections[name](dry, folder):
            rows.write(json.dumps(row) + "\n")
            rows.flush()


def _run_beside(name: str, limit: float, folder: Path, dry: bool) -> Iterator[dict[str, Any]]:
    """What a section has given, whenever there is more; the last is all. ``failed`` says why it did not end well."""
    if limit <= 0:
        yield {"seconds": 0.0, "results": [], "failed": "there was no time left"}
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--folder", str(folder)]
    rows, log = folder / f"{name}.rows", folder / f"{name}.log"
    started, known = time.monotonic(), -1
    with log.open("w") as output:
        process = subprocess.Popen(
            command + ["--dry"] * dry, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while True:
            time.sleep(_PERIOD)
            ended, seconds = process.poll() is not None, time.monotonic() - started
            # What is behind the last end of a line is not complete.
            lines = rows.read_text().split("\n")[:-1] if rows.exists() else []
            found: dict[str, Any] = {
                "seconds": round(seconds, 1),
                "results": [json.loads(line) for line in lines],
            }
            if process.returncode:
                said = log.read_text(errors="replace").splitlines()[-_LINES:]
                found["failed"] = "\n".join(said) or f"ended with status {process.returncode}"
            elif not ended and seconds > limit:
                found["failed"] = f"stopped after {limit:.0f} seconds"
            last = ended or "failed" in found
            if last or len(lines) > known:
                known = len(lines)
                yield found
            if last:
                return
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
