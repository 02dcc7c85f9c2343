"""From candidates to a report: each in a fresh process, one after the other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import environment
from .cases import Candidate, Result, Workload
from .prediction import predict


def run(
    candidates: Sequence[Candidate],
    workload: Workload,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure every candidate.

    Args:
        candidates: what is compared; one that fails is a result that says why.
        workload: what each has to do.
        progress: called with how many are done, how many there are, and the next one's name.

    Returns:
        The report, plain values: ``workload``, ``results`` (`Result.to_json`), and where it was measured.
    """
    results = []
    for number, candidate in enumerate(candidates):
        if progress is not None:
            progress(number, len(candidates), f"{candidate.path} ({candidate.runtime})")
        result = _in_a_process(candidate, workload)
        results.append(replace(result, predicted=predict(result, workload)).to_json())
    if progress is not None:
        progress(len(candidates), len(candidates), "")
    return {
        "benchmark": "bench",
        **environment.describe(),
        "workload": asdict(workload),
        "results": results,
    }


def _in_a_process(candidate: Candidate, workload: Workload) -> Result:
    request = json.dumps({"candidate": asdict(candidate), "workload": asdict(workload)})
    command = [sys.executable, "-m", "glmquant.bench.worker"]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Result.from_json(json.loads(lines[-1]))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        killed = ", which is how Linux ends what takes too much memory" if name == "SIGKILL" else ""
        return Result(candidate, error=f"the process was ended by {name}{killed}")
    said = done.stderr.strip().splitlines()
    return Result(candidate, error=f"the process failed ({said[-1] if said else done.returncode})")
