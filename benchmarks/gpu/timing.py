"""Timing work on a GPU with its own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds(work: Callable[[int], Any], inputs: int, repeats: int = 20) -> float:
    """Median time of ``work(number)``, the number going round ``0..inputs - 1`` so that inputs are not in a cache."""
    for number in range(inputs):
        work(number)
    torch.cuda.synchronize()
    times: list[float] = []
    for number in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work(number % inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copies(tensor: torch.Tensor, nbytes: int = 1 << 29) -> Sequence[torch.Tensor]:
    """As many copies as exceed every cache together, at least two."""
    count = max(2, -(-nbytes // (tensor.numel() * tensor.element_size())))
    return [tensor.clone() for _ in range(count)]
