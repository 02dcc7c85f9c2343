"""The thread that owns the model: a bounded queue, continuous batching, cancelling, time limits, draining.

Every step advances all requests that are answering by a token, and reads the prompts of newcomers with what is left of
the step's tokens, so a long prompt delays the others by one chunk at a time.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import GlmquantError
from ..models.chat import InvalidScoreLogitsProcessor
from ..models.streaming import Transcript
from .jobs import Failed, Job, QueueFull, Refused, Run, ShuttingDown, TimedOut, Update
from .runners import Piece, Runner
from .sampling import choose, penalize

logger = logging.getLogger(__name__)

# While others are answering, prompts get this part of a step, so that they need not wait long for their tokens.
_SHARED_STEP = 4
# So many requests that fail one after the other are not at fault themselves: the model is.
_FAILURES = 3


@dataclass
class Counts:
    """What has happened since the start, for metrics."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


class Engine:
    """See the module.

    Args:
        runner: the model.
        decode: text of ids; called in the engine's thread only.
        fallback: the token to choose where the model computed no numbers.
        queue: requests that may wait while all slots are taken.
        observe: called with a job that ended, for metrics.
    """

    def __init__(
        self,
        runner: Runner,
        decode: Callable[[Sequence[int]], str],
        fallback: int,
        queue: int = 128,
        observe: Callable[[Job, Update], None] = lambda job, update: None,
    ) -> None:
        self._runner, self._decode, self._limit = runner, decode, queue
        self._observe = observe
        self._guard = InvalidScoreLogitsProcessor(fallback)
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reserved = 0
        self._failures = 0  # steps of a single request in a row
        self._running: list[Run] = []
        self._held: list[list[int]] = [
            [] for _ in range(runner.slots)
        ]  # ids whose keys and values a slot has
        self._used = [0.0] * runner.slots
        self._draining = self._stopping = False
        self.failed: str | None = None
        self.counts = Counts()
        # A daemon: a step of a large model may take seconds, and the process may be told to end at once.
        self._thread = threading.Thread(target=self._run, name="glmquant-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue, those included whose prompts are still being encoded."""
        return len(self._waiting) + self._reserved

    @property
    def places(self) -> int:
        """Requests that there is room for, in the queue and in slots."""
        return self._limit + self._runner.slots

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def reserve(self, count: int = 1) -> None:
        """Keep places in the queue for jobs that are being made; each is taken by `submit`, or given back by `release`.

        Raises:
            QueueFull: too many wait.
            ShuttingDown: nothing new is taken.
            Failed: the engine has died.
        """
        with self._lock:
            self._check_open()
            if self.waiting + len(self._running) + count > self.places:
                raise QueueFull(f"{self.waiting} requests are waiting already; ask again later.")
            self._reserved += count

    def release(self, count: int) -> None:
        """Give places back."""
        with self._lock:
            self._reserved -= count

    def submit(self, job: Job) -> None:
        """Queue a job in a place that was reserved; its listener hears the rest.

        Raises:
            ShuttingDown: nothing new is taken; the place stays reserved.
            Failed: the engine has died; the place stays reserved.
        """
        with self._lock:
            self._check_open()
            self._reserved -= 1
            self._waiting.append(job)
            self._lock.notify()

    def _check_open(self) -> None:
        if self.failed is not None:
            raise Failed(self.failed)
        if self._draining:
            raise ShuttingDown("the server is shutting down; ask again, elsewhere or later.")

    def cancel(self, job: Job) -> None:
        """Forget a job; its listener hears nothing more. It stops before the next step."""
        with self._lock:
            job.cancelled = True
            self._lock.notify()

    def drain(self) -> None:
        """Take nothing new, finish what runs, refuse what waits."""
        with self._lock:
            self._draining = True
            refused, self._waiting = list(self._waiting), deque()
            self._lock.notify()
        for job in refused:
            self._end(
                job, Update(error=ShuttingDown("the server is shutting down; ask again, elsewhere or later."))
            )

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread; what runs is told so. Whether it has ended within `timeout` seconds."""
        self.drain()
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._collect():
                self._step()
            error: Refused = ShuttingDown("the server was shut down before the answer was complete.")
        except BaseException:
            logger.exception("the engine has ended")
            self.failed = "the server's engine has failed; its log says why."
            error = Failed(self.failed)
        with self._lock:
            self._draining = True
            jobs = [sequence.job for sequence in self._running] + list(self._waiting)
            self._running, self._waiting = [], deque()
        for job in jobs:
            self._end(job, Update(error=error))

    def _collect(self) -> bool:
        """Wait for work, drop what nobody waits for, fill free slots; False when it is time to end."""
        late: list[Job] = []
        gone: list[Job] = []
        with self._lock:
            while not self._stopping and self.idle:
                self._lock.wait()
            if self._stopping:
                return False
            now = time.monotonic()
            for sequence in list(self._running):
                job = sequence.job
                if job.cancelled or job.deadline < now:
                    (gone if job.cancelled else late).append(job)
                    self._release(sequence)
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                (gone if job.cancelled else late if job.deadline < now else self._waiting).append(job)
        for job in gone:
            self._observe(job, Update())
        for job in late:
            self._end(job, Update(error=TimedOut("the answer took longer than this server allows.")))
        while self._waiting and len(self._running) < self._runner.slots:
            self._fill()
        return True

    def _fill(self) -> None:
        """Give the first that waits a slot; others can queue while what it shares with another is copied."""
        with self._lock:
            if not self._waiting:
                return
            job = self._waiting[0]
        run = self._place(job)
        with self._lock:
            if self._waiting and self._waiting[0] is job:  # or else all were refused meanwhile
                self._waiting.popleft()
                job.started = time.monotonic()
                self._running.append(run)

    def _place(self, job: Job) -> Run:
        """A job in a free slot, with as much of its beginning as any slot holds.

        That is the slot whose conversation it continues, or else the one not used for longest, to which the
        beginning is copied.
        """
        held = {sequence.slot: sequence.ids[: sequence.computed] for sequence in self._running}
        free = [slot for slot in range(self._runner.slots) if slot not in held]
        held |= {slot: self._held[slot] for slot in free}
        common = {slot: self._common(ids, job.ids) for slot, ids in held.items()}
        slot = max(
            free,
            key=lambda slot: (common[slot] if 2 * common[slot] > len(held[slot]) else 0, -self._used[slot]),
        )
        best = max(common, key=lambda slot: common[slot])
        if common[best] > common[slot]:
            self._runner.copy(best, slot, common[best])
        self._held[slot] = []
        self.counts.reused_tokens += common[best]
        return Run(job, slot, common[best], Transcript(self._decode))

    def _common(self, held: Sequence[int], ids: Sequence[int]) -> int:
        """Tokens that `held` and `ids` begin with alike; at least one of `ids` is left to compute."""
        if not self._runner.reuses:
            return 0
        pairs = zip(held, ids[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _release(self, sequence: Run) -> None:
        self._held[sequence.slot] = sequence.ids[: sequence.computed]
        self._used[sequence.slot] = time.monotonic()
        self._running.remove(sequence)

    def _step(self) -> None:
        groups = [self._plan()]
        while groups:
            group = groups.pop()
            try:
                chosen = self._compute(group)
            except Exception as error:
                if _ends_all(error):
                    raise
                if len(group) > 1:
                    logger.exception("a step for %d requests failed; each is tried by itself", len(group))
                    groups = [[each] for each in group]
                    continue
                self._fail(group[0][0])
                if isinstance(error, GlmquantError):  # it is the request that is wrong
                    continue
                self._failures += 1
                if self._failures >= _FAILURES:
                    raise
                continue
            self._failures = 0
            for (sequence, piece), row in zip(group, chosen, strict=True):
                self._advance(sequence, piece, row)

    def _plan(self) -> list[tuple[Run, Piece]]:
        """What the next step computes."""
        answering = [s for s in self._running if s.new]
        planned = [(s, Piece(s.slot, s.ids[s.computed :], s.computed)) for s in answering]
        newcomers = [s for s in self._running if not s.new]
        if not newcomers:
            return planned
        if self._runner.chunk is None:
            return planned + [(s, Piece(s.slot, s.ids, 0)) for s in newcomers]
        room = max(1, self._runner.chunk // (_SHARED_STEP if answering else 1))
        # The oldest has half of the room at least; the rest goes to those who need least, so that a short prompt
        # does not wait for all of a long one.
        oldest, *others = newcomers
        others.sort(key=lambda s: len(s.ids) - s.computed)
        shares = [(oldest, -(-room // 2) if others else room), *((s, room) for s in others), (oldest, room)]
        parts = dict.fromkeys(newcomers, 0)
        for sequence, most in shares:
            take = min(most, room, len(sequence.ids) - sequence.computed - parts[sequence])
            parts[sequence] += take
            room -= take
        for sequence, count in parts.items():
            if count:
                stop = sequence.computed + count
                ids = sequence.ids[sequence.computed : stop]
                planned.append(
                    (sequence, Piece(sequence.slot, ids, sequence.computed, stop == len(sequence.ids)))
                )
        return planned

    def _compute(self, planned: Sequence[tuple[Run, Piece]]) -> list[int | None]:
        """The next token of each; None where the prompt is not read to its end."""
        logits = self._runner.step([piece for _, piece in planned])
        wanted = [sequence for sequence, piece in planned if piece.wanted]
        samplers = [sequence.sampler for sequence in wanted]
        if samplers:
            scores = penalize(self._guard(logits, logits), samplers, [sequence.ids for sequence in wanted])
        rows = iter(choose(scores, samplers) if samplers else [])
        self.counts.steps += 1
        return [next(rows) if piece.wanted else None for _, piece in planned]

    def _advance(self, sequence: Run, piece: Piece, row: int | None) -> None:
        job = sequence.job
        self.counts.prompt_tokens += 0 if sequence.new else len(piece.ids)
        sequence.computed += len(piece.ids)
        if row is None:
            return
        job.first = job.first or time.monotonic()
        self.counts.generated_tokens += 1
        try:
            update = sequence.add(row)
        except Exception:
            self._fail(sequence)
            return
        if update is not None and update.finish is not None:
            with self._lock:
                self._release(sequence)
            self._end(job, update)
        elif update is not None:
            self._tell(job, update)

    def _fail(self, sequence: Run) -> None:
        """A request that the model, or the tokenizer, cannot deal with."""
        logger.exception("a request failed")
        with self._lock:
            sequence.computed = 0  # what its slot holds is uncertain
            self._release(sequence)
        self._end(
            sequence.job, Update(error=Failed("the model failed on this request; the server's log says how."))
        )

    def _end(self, job: Job, update: Update) -> None:
        self._observe(job, update)
        self._tell(job, update)

    @staticmethod
    def _tell(job: Job, update: Update) -> None:
        if not job.cancelled:
            job.listener(update)


def _ends_all(error: Exception) -> bool:
    """Whether nothing can be computed any more: after most errors of a CUDA kernel the process has lost the GPU."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
