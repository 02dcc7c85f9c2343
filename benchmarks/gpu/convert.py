"""``glmquant convert`` on the real shapes, on the GPU and on the CPU of the same machine.

python -m benchmarks.gpu.convert SOURCE OUT RECIPE cuda|cpu        one conversion, of which the whole process counts
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import glmquant
from glmquant._hashing import sha256

from .. import measure as outside
from .. import synthetic

_LAYERS = 8  # of ChatGLM3-6B: 4.3 GB
_RECIPES: dict[str, dict[str, Any]] = {
    "int4-g128-mse": {"bits": 4},
    "int4-g128-rtn": {"bits": 4, "method": "rtn"},
    "cpm-int4": {"format": "cpm"},
}


def source(dry: bool, folder: Path) -> Path:
    """The checkpoint that is converted, made where it is missing."""
    return (
        synthetic.build_tiny(folder / "source") if dry else synthetic.build(folder / "source", layers=_LAYERS)
    )


def measure(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds and GB/s of the source by recipe and device, the source in the page cache; and whether bytes agree."""
    checkpoint, out = source(dry, folder), folder / "converted"
    nbytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    devices = ["cpu"] if dry else ["cuda", "cpu"]
    # The first of all compiles the kernels, and warms the page cache.
    works = [(next(iter(_RECIPES)), devices[0], True), *((r, d, False) for r in _RECIPES for d in devices)]
    works = works[: 1 if dry else None]
    digests: dict[str, set[str]] = {name: set() for name in _RECIPES}
    for name, device, first in works:
        command = [sys.executable, "-m", "benchmarks.gpu.convert", str(checkpoint), str(out), name, device]
        row = {"recipe": name, "device": device, "first": first}
        shutil.rmtree(out, ignore_errors=True)
        try:
            cost = outside.run(command)
        except SystemExit as error:
            yield row | {"failed": str(error)[-1000:]}
            continue
        digests[name].add(_digest(out))
        yield row | {
            "seconds": round(cost.seconds, 2), "cpu_seconds": round(cost.cpu_seconds, 2),
            "GB/s": round(nbytes / cost.seconds / 1e9, 2), "same_bytes": len(digests[name]) == 1,
            "hints": cost.output.splitlines(),
        }  # fmt: skip


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        digest.update(sha256(path).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    _source, _out, _recipe, _device = sys.argv[1:]
    _done = glmquant.convert(_source, _out, glmquant.Recipe(**_RECIPES[_recipe]), device=_device)
    print(*_done.hints, sep="\n")
