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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glmquant.bench import environment

from . import convert, end_to_end, matmul, quantize

SECTIONS: dict[str, Callable[[], Any]] = {
    "bandwidth": quantize.bandwidth,
    "matmul": partial(matmul.measure, False),
    "end_to_end": partial(end_to_end.measure, False),
    "memory": partial(end_to_end.measure_memory, False),
    "kernels": quantize.kernels,
    "convert": convert.measure_devices,
}
DRY: dict[str, Callable[[], Any]] = {
    "matmul": partial(matmul.measure, True),
    "end_to_end": partial(end_to_end.measure, True),
    "memory": partial(end_to_end.measure_memory, True),
}
RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """See the module; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="default: all")
    parser.add_argument("--tests", type=int, help="exit status of the GPU tests, to be recorded")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU: only to see that this program works"
    )
    options = parser.parse_args()
    sections = DRY if options.dry else SECTIONS
    if not options.dry and not torch.cuda.is_available():
        print("there is no GPU here.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "benchmark": "gpu",
        **environment.describe(),
        "gpu": None if options.dry else _gpu(),
        "tests_status": options.tests,
    }
    failed = 0
    for name in options.only or sections:
        started = time.perf_counter()
        try:
            found = sections[name]()
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
