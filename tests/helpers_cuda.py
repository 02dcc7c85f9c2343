"""The CUDA kernels on a CPU: their own source, compiled by a C++ compiler with a shim for what CUDA supplies."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from glmquant import _cuda
from glmquant._folders import kernel_folder

HERE = Path(__file__).parent
# The compiler needs _Float16.
COMPILER = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)

needs_shim = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler to build the CUDA kernels for a CPU with"
)


@cache
def shim_library() -> Path:
    """The library, built."""
    library = Path(tempfile.mkdtemp(prefix="glmquant-shim-")) / "shim.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    sources = ["-I", str(kernel_folder("cuda")), str(HERE / "cuda_shim.cpp")]
    subprocess.run([str(COMPILER), *flags, *sources, "-o", str(library)], check=True)
    return library


@cache
def _shim() -> ctypes.CDLL:
    return ctypes.CDLL(str(shim_library()))


def run_on_cpu(name: str, blocks: int, threads: int, parameters: list[Any]) -> None:
    """As cuLaunchKernel."""
    pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    assert _shim().shim_launch(name.encode(), blocks, threads, pointers) == 0, name


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is meant for a GPU takes tensors on the CPU."""
    monkeypatch.setattr(_cuda, "kernels", lambda device: _cuda.Kernels(run_on_cpu))
