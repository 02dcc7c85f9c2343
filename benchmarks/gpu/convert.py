"""``glmquant convert`` on the real shapes, on the GPU and on the CPU of the same machine."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from glmquant._hashing import sha256

from .. import measure, synthetic

_LAYERS = 8  # of ChatGLM3-6B: 4.3 GB
_RECIPES = {
    "int4-g128-mse": ["--bits", "4"],
    "int4-g128-rtn": ["--bits", "4", "--method", "rtn"],
    "cpm-int4": ["--format", "cpm"],
}


def measure_devices() -> list[dict[str, Any]]:
    """Seconds and GB/s of the source by recipe and device, the source in the page cache; and that the bytes agree."""
    folder = Path(tempfile.mkdtemp(prefix="glmquant-gpu-bench-"))
    try:
        source = synthetic.build(folder / "source", layers=_LAYERS)
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        return [row for name in _RECIPES for row in _compare(name, source, folder, nbytes)]
    finally:
        shutil.rmtree(folder)


def _compare(name: str, source: Path, folder: Path, nbytes: int) -> list[dict[str, Any]]:
    rows, digests = [], []
    for device in ("cuda", "cpu", "cuda"):  # the first also compiles the kernels, and warms the page cache
        out = folder / "out"
        command = [sys.executable, "-m", "glmquant.cli", "convert", str(source), str(out), "--json"]
        cost = measure.run([*command, *_RECIPES[name], "--device", device])
        digests.append(_digest(out))
        shutil.rmtree(out)
        rows.append(
            {
                "recipe": name,
                "device": device,
                "seconds": round(cost.seconds, 2),
                "cpu_seconds": round(cost.cpu_seconds, 2),
                "GB/s": round(nbytes / cost.seconds / 1e9, 2),
            }
        )
    rows[0]["device"] = "cuda (first run)"
    return [row | {"same_bytes": len(set(digests)) == 1} for row in rows]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        digest.update(sha256(path).encode())
    return digest.hexdigest()
