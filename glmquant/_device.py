"""Where a conversion quantizes: on the CPU, or on a GPU with copies that overlap with the work.

Every worker thread has a CUDA stream of its own. While one worker's kernels run, another's rows are on their way to
the GPU through pinned memory, a third's results on their way back, and a fourth reads from the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from . import _cuda
from .errors import UsageError

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")


@dataclass
class Gpu:
    """One GPU, shared by worker threads.

    Attributes:
        device: which one.
        fallbacks: how often its memory was short.
    """

    device: torch.device
    fallbacks: int = 0
    _lane: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, rows: Tensor, work: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """`work`, which gets `rows` on the GPU and returns tensors there; here they come back in pinned memory.

        None where the GPU's memory is short.
        """
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream()):
                results = work(self._upload(rows))
                back = {name: tensor.to("cpu", non_blocking=True) for name, tensor in results.items()}
                torch.cuda.current_stream().synchronize()
                return back
        except torch.OutOfMemoryError:
            with self._lock:
                self.fallbacks += 1
            return None

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._lane, "stream"):
            self._lane.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._lane.stream
        return stream

    def _upload(self, rows: Tensor) -> Tensor:
        """A source's rows are pages of a file: they go through this worker's pinned memory. `run` waits for its stream,
        so that memory is free by the next time.
        """
        nbytes = rows.numel() * rows.element_size()
        if not hasattr(self._lane, "pinned") or self._lane.pinned.numel() < nbytes:
            self._lane.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        staged: Tensor = self._lane.pinned[:nbytes].view(rows.dtype).view(rows.shape)
        staged.copy_(rows)
        return staged.to(self.device, non_blocking=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on the CPU or on a GPU."""
    said = (
        "allocate memory",
        "out of memory",
        "ALLOC_FAILED",
        "bad alloc",
    )  # by a CPU, libraries of a GPU, C++
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


def find_gpu(device: str) -> tuple[Gpu | None, str | None]:
    """The GPU that ``--device`` asks for, or None to work on the CPU; and why one that is there is not used.

    Args:
        device: one of `DEVICES`; ``auto`` is a GPU if there is one that can be used.

    Raises:
        UsageError: ``cuda`` where there is no GPU, or none that can be used.
    """
    if device not in DEVICES:
        raise UsageError(f"device {device!r} is not known; use {', '.join(DEVICES)}.")
    if device == "cpu":
        return None, None
    if not torch.cuda.is_available():
        if device == "auto":
            return None, None
        reason = "sees no GPU here" if torch.version.cuda else "was built without CUDA"
        raise UsageError(f"there is nothing for --device cuda to run on: torch {torch.__version__} {reason}.")
    found = torch.device("cuda", torch.cuda.current_device())
    why = _cuda.why_not(found)
    if why is None:
        return Gpu(found), None
    if device == "cuda":
        raise UsageError(f"--device cuda cannot work here: {why}; use --device cpu.")
    return None, why
