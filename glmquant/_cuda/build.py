"""``make kernels``: the kernels for every architecture in one file, by nvcc. Never required."""

from __future__ import annotations

import shutil
import subprocess
import sys

from .._folders import kernel_folder
from .binary import built_file
from .source import ARCHITECTURES, FLAGS, MAIN


def command(out: str) -> list[str]:
    """What makes the fat binary `out`: machine code for each architecture, and PTX for those between and to come."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in (ARCHITECTURES[0], ARCHITECTURES[-1])]
    return ["nvcc", "-fatbin", *FLAGS, *targets, "-o", out, str(kernel_folder("cuda") / MAIN)]


def main() -> int:
    """Build; returns the exit status."""
    if shutil.which("nvcc") is None:
        print("make kernels needs nvcc, of the CUDA toolkit 12.8 or newer.", file=sys.stderr)
        return 2
    file = built_file()
    for old in file.parent.glob("glmquant-*.fatbin"):
        old.unlink()
    done = subprocess.run(command(str(file)), check=False)
    if done.returncode == 0:
        print(f"{file}: {file.stat().st_size} bytes")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
