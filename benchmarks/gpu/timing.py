"""Timing work on a GPU with its own clock; or, to try out the programs, on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds(work: Callable[[int], Any], inputs: int, repeats: int = 20) -> float:
    """Median time of ``work(number)``, the number going round ``0..inputs - 1`` so that inputs are not in a cache."""
    for number in range(inputs):
        work(number)
    return statistics.median(_once(lambda n=number % inputs: work(n)) for number in range(repeats))  # type: ignore[misc]


def graphed_seconds(work: Callable[[int], Any], inputs: int, repeats: int = 7) -> float:
    """The same for work that a host launches more slowly than a GPU does it: all inputs in one CUDA graph.

    Without a GPU, as it comes.
    """
    if not torch.cuda.is_available():
        return statistics.median(_once(lambda: [work(n) for n in range(inputs)]) for _ in range(2)) / inputs
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(inputs):
            work(number)
    graph.replay()
    return statistics.median(_once(graph.replay) for _ in range(repeats)) / inputs


def copies(tensor: torch.Tensor, nbytes: int = 1 << 29) -> Sequence[torch.Tensor]:
    """As many copies as exceed every cache together, at least two."""
    count = max(2, -(-nbytes // (tensor.numel() * tensor.element_size())))
    return [tensor.clone() for _ in range(count)]


def wall_seconds(work: Callable[[], Any]) -> float:
    """Time on the host until everything is done."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(work: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        return wall_seconds(work)
    _wait()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
