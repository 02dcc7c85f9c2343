"""What is asked of the engine, how far it is, and why it may not be answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import GlmquantError
from ..models.streaming import Transcript
from .sampling import Sampler, Sampling

Finish = Literal["stop", "length"]


class Refused(GlmquantError):
    """The engine does not take, or does not finish, a request; the message is for the client."""


class QueueFull(Refused):
    """More requests wait than are allowed to."""


class ShuttingDown(Refused):
    """The server finishes what runs, and takes nothing new."""


class TimedOut(Refused):
    """A request was not answered within its time."""


class Failed(Refused):
    """The model failed; the log says how."""


@dataclass(frozen=True)
class Update:
    """How far an answer is.

    Attributes:
        text: all of it so far; it never ends inside of a character.
        tokens: ids generated so far, the one that ended the answer included.
        finish: why it ended; None while it goes on.
        error: why it will never end; nothing follows.
        reused: tokens of the prompt that were in memory already.
    """

    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    error: Refused | None = None
    reused: int = 0


@dataclass(eq=False)
class Job:
    """A request for an answer.

    Attributes:
        ids: of the prompt.
        max_new_tokens: most tokens to generate.
        sampling: how to choose them.
        stop_ids: an answer ends with one of these, which is not part of it.
        stop: texts that end it, too.
        listener: called with every `Update`, in the engine's thread; must not wait.
        deadline: of `time.monotonic`, for all of it.
        submitted, started, first: when it came, left the queue, and had its first token.
    """

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    listener: Callable[[Update], None]
    deadline: float = float("inf")
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0


class Run:
    """A job in a slot."""

    def __init__(self, job: Job, slot: int, reused: int, transcript: Transcript) -> None:
        self.job, self.slot, self.reused = job, slot, reused
        self.sampler = Sampler(job.sampling)
        self.ids = list(job.ids)
        self.computed = reused
        self._transcript = transcript

    @property
    def new(self) -> int:
        """Tokens generated."""
        return len(self.ids) - len(self.job.ids)

    def add(self, row: int) -> Update | None:
        """Take the next token; what there is to tell, if anything."""
        self.ids.append(row)
        job = self.job
        grew = False
        if row in job.stop_ids:
            finish: Finish | None = "stop"
        else:
            before = len(self._transcript.text)
            grew = self._transcript.add(row)
            if grew and (end := self._stop_at(self._transcript.text, before)) is not None:
                return Update(self._transcript.text[:end], self.new, "stop", reused=self.reused)
            finish = "length" if self.new >= job.max_new_tokens else None
        if finish is None:
            return Update(self._transcript.text, self.new, reused=self.reused) if grew else None
        text = self._transcript.whole()
        end = self._stop_at(text, 0)
        if end is not None:
            text, finish = text[:end], "stop"
        return Update(text, self.new, finish, reused=self.reused)

    def _stop_at(self, text: str, seen: int) -> int | None:
        """Where the first stop text begins, of which at least a character is beyond `seen`."""
        found = [text.find(stop, max(0, seen - len(stop))) for stop in self.job.stop]
        return min((place for place in found if place >= 0), default=None)
