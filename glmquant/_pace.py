"""What is told of work that goes block by block: which block, what is being done in it, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable

_PREFIX = "block "


class Pace:
    """Tells of one block after the other.

    Args:
        blocks: how many there are.
        told: is called with every text.
        clock: seconds.
    """

    def __init__(
        self, blocks: int, told: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._blocks, self._told, self._clock = blocks, told, clock
        self._block = self._first = 0
        self._begun = self._spent = 0.0

    def begin(self, block: int) -> None:
        """The work on a block, counted from 0, begins."""
        if not self._begun:
            self._first = block
        self._block, self._begun = block, self._clock()

    def end(self) -> None:
        """And ends: what it took is what each of the others is expected to take."""
        self._spent += self._clock() - self._begun

    def __call__(self, what: str) -> None:
        """Tell what is being done in the block."""
        self._told(f"{_PREFIX}{self._block + 1} of {self._blocks}: {what}{self._rest()}")

    def _rest(self) -> str:
        done = self._block - self._first
        if not done:
            return ""  # the first block of a run says how long they take
        rest = (self._blocks - self._block) * self._spent / done - (self._clock() - self._begun)
        return f", about {_duration(max(rest, 0))} left"


def of_block(text: str) -> bool:
    """Whether a `Pace` told this."""
    return text.startswith(_PREFIX)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
