"""The CUDA kernels (``kernels/cuda``): compiled once for a GPU, and launched through cpm_kernels.

They give the same bytes as the code for CPUs. Where one of the things they need is missing everything is done on the
CPU, or by torch where a weight is on the GPU already; `why_not` says in a sentence what is missing.
``GLMQUANT_CUDA=0`` turns them off.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UnavailableError

if TYPE_CHECKING:
    import torch

__all__ = ["Kernels", "kernels", "why_not"]

# The parameters of every kernel: a pointer, an int, an int64 or a float.
SIGNATURES = {
    "glmquant_scales": "piqqiiipiifpipp",
    "glmquant_encode": "piqqqqiipipip",
    "glmquant_pack": "pqqiip",
    "glmquant_unpack": "pqqiip",
    "glmquant_dequantize": "pqqqqiipippi",
    "glmquant_errors": "piqqqqppipp",
}
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_int64, "f": ctypes.c_float}

MOST_THREADS = 2**31 - 1
"""In one launch."""

Run = Callable[[str, int, int, list[Any]], None]
"""Launches: name, blocks, threads in each, and the parameters as ctypes objects."""


@dataclass(frozen=True)
class Kernels:
    """The kernels on one GPU."""

    run: Run

    def launch(self, name: str, threads: int, *arguments: torch.Tensor | float | None) -> None:
        """Run the kernel `name` in at least `threads` threads, on torch's current stream.

        Args:
            name: one of `SIGNATURES`.
            threads: at most `MOST_THREADS`.
            arguments: contiguous tensors on the GPU, or None for a null pointer; numbers.
        """
        # Few threads (one for each long row) are spread over many multiprocessors.
        block = 256 if threads >= 1 << 16 else 32
        parameters = [
            _TYPES[kind](value if value is None or isinstance(value, (int, float)) else value.data_ptr())
            for kind, value in zip(SIGNATURES[name], arguments, strict=True)
        ]
        self.run(name, -(-threads // block), block, parameters)


_lock = threading.Lock()
_found: dict[int, Kernels | str] = {}


def kernels(device: torch.device) -> Kernels | None:
    """The kernels for a GPU, compiled now if they have to be; None where that is impossible."""
    found = _find(device)
    return found if isinstance(found, Kernels) else None


def why_not(device: torch.device) -> str | None:
    """Why `kernels` is None, as a sentence without its full stop; None where it is not."""
    found = _find(device)
    return found if isinstance(found, str) else None


def _find(device: torch.device) -> Kernels | str:
    if device.type != "cuda":
        return "the CUDA kernels are for NVIDIA GPUs"
    index = _current_device() if device.index is None else device.index
    with _lock:
        if index not in _found:
            _found[index] = _load(index)
        return _found[index]


def _current_device() -> int:
    import torch

    return torch.cuda.current_device()


def _load(index: int) -> Kernels | str:
    if os.environ.get("GLMQUANT_CUDA") == "0":
        return "GLMQUANT_CUDA=0 turns the CUDA kernels off"
    try:
        from . import binary, launcher

        base = launcher.import_base()
        return Kernels(launcher.launcher(base, index, binary.load(index)))
    except UnavailableError as error:
        return str(error)
