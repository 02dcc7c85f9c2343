"""How many threads work on weights, and what the process's allocator is told while they do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_WORKERS = 8


def cores() -> int:
    """Cores this process may use, but no more than can be fed: hashing and writing take one thread each."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, _MOST_WORKERS)


@contextmanager
def tuned_for_blocks() -> Iterator[None]:
    """Settings of the process for many short operations on blocks of a few megabytes.

    One worker per core beats torch's own threads: no barrier after each of a dozen operations. And glibc by
    default returns blocks of this size to the kernel when they are freed, and every new one is paid for with page
    faults, which cost more than the arithmetic; it is told to keep them.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_blocks(True)
    try:
        yield
    finally:
        _keep_freed_blocks(False)
        torch.set_num_threads(threads)


def _keep_freed_blocks(keep: bool) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20 if keep else 128 << 10)
    mallopt(trim_threshold, 256 << 20 if keep else 128 << 10)


def return_freed_memory() -> None:
    """Give the kernel back what was freed but kept: with glibc tens of megabytes after many blocks of a few."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc
