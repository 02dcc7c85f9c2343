"""Run every section and write one JSON document.

    python -m benchmarks.gpu [--only SECTION ...] [--tests STATUS] [--out FILE]

A section that fails is recorded with what it said, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glmquant.bench import environment

from . import convert, memory, quantize

SECTIONS: dict[str, Callable[[], Any]] = {
    "bandwidth": quantize.bandwidth,
    "kernels": quantize.kernels,
    "memory": memory.predictions,
    "convert": convert.measure_devices,
}
RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """See the module; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tests", type=int, help="exit status of the GPU tests, to be recorded")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "benchmark": "gpu",
        **environment.describe(),
        "gpu": _gpu(),
        "tests_status": options.tests,
    }
    failed = 0
    for name in options.only:
        started = time.perf_counter()
        try:
            found = SECTIONS[name]()
        except Exception:  # whatever one section dies of, the others are worth having
            found, failed = {"failed": traceback.format_exc()}, failed + 1
        result[name] = {"seconds": round(time.perf_counter() - started, 1), "results": found}
        print(json.dumps({name: result[name]}), flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)
    return 1 if failed else 0


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
