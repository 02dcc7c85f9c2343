"""Memory in huge pages, which processors find their way through faster.

Reading weights from 4 KiB pages, a processor looks up every page, on a virtual machine twice. In pages of 2 MiB two
cores have been seen to read twice as fast.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under `tensor`, which has memory of a CPU that has not been written to; returns it.

    Linux only, and the system may not have any; nothing else changes then. What is below 2 MiB is left alone.
    """
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    size = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE - start
    advise = _madvise()
    if size > 0 and advise is not None:
        advise(start, size, _MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
