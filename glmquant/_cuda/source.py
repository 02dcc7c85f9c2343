"""The kernels' sources and how they are compiled, for NVRTC and nvcc alike."""

from __future__ import annotations

import hashlib

from .._folders import kernel_folder

MAIN = "glmquant.cu"
"""The program; the other sources are included by it."""

# Roundings are part of what a kernel promises: no contraction of a*b+c, subnormals, and division as IEEE has it.
FLAGS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true")

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Those that ``make kernels`` builds for: Turing to Blackwell."""


def texts() -> dict[str, str]:
    """Every source by file name."""
    files = sorted(path for path in kernel_folder("cuda").iterdir() if path.suffix in (".cu", ".cuh"))
    return {path.name: path.read_text() for path in files}


def digest(*more: str) -> str:
    """Identifies the sources, the flags, and whatever `more` the result depends on."""
    parts = [*(part for item in texts().items() for part in item), *FLAGS, *more]
    return hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]
