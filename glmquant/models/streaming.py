"""Tokens and text of an answer while it is generated."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Generator, Sequence
from itertools import takewhile
from queue import SimpleQueue
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# What an incomplete character decodes to.
_HALF = "\ufffd"
# A character has at most four bytes; more tokens than this that give none are not the start of one.
_PATIENCE = 16
# Ids that are decoded again with a new one, where none is fit to begin with: white space, and what shows nothing.
_MOST_AGAIN = 32


class Transcript:
    """The text of a growing list of ids, decoded a few ids at a time.

    An id is decoded together with those before it that it may depend on, not with the whole answer, so a
    long answer costs time in proportion to its length. Bytes of an unfinished character are held back.

    Args:
        decode: the text of a list of ids.

    Attributes:
        ids: every id so far.
        text: the text so far. It ends inside a character only where the model has written bytes that are no text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.ids: list[int] = []
        self.text = ""
        # What is decoded with the next id: the first `known` of these are in text, and are there because the space in
        # front of a piece depends on whether it comes first. They begin with a piece that shows, or as the answer does.
        self._window: list[int] = []
        self._known = 0
        self._halves = 0

    def add(self, row: int) -> bool:
        """Append an id; True when the text changed."""
        self.ids.append(row)
        self._window.append(row)
        before = self._decode(self._window[: self._known])
        after = self._decode(self._window)
        if after == before:
            if len(self._window) - self._known > _PATIENCE:
                self._window.pop()  # it shows nothing, like those before it
            return False
        self._halves = self._halves + 1 if after.endswith(_HALF) else 0
        if 0 < self._halves < _PATIENCE:
            return False
        self._halves = 0
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        same = sum(1 for _ in alike)
        self.text = self.text[: len(self.text) - len(before) + same] + after[same:]
        latest = self._decode(self._window[self._known :])
        if latest.strip() and self.text.endswith(latest):
            del self._window[: self._known]
        elif len(self._window) > _MOST_AGAIN:
            # The first ones take what decoding does to a beginning; how the text grows shows by the last ones.
            del self._window[_MOST_AGAIN // 4 : -_MOST_AGAIN // 4]
        self._known = len(self._window)
        return True

    def whole(self) -> str:
        """The text of all ids, decoded at once; a character that was never finished is left out."""
        return self._decode(self.ids).rstrip(_HALF)


class _Tokens(BaseStreamer):
    """Hands the ids that `generate` reports to a queue, without the prompt that it reports first."""

    def __init__(self, queue: SimpleQueue[int | BaseException | None]) -> None:
        self.queue = queue
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for row in value.flatten().tolist():
                self.queue.put(row)
        self.prompt_seen = True

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """Stops generation after the token at hand once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Generation(threading.Thread):
    """Runs ``model.generate``, whose ids go to a queue, and in the end None or the error.

    A daemon, since Python waits for other threads before it runs what is registered with atexit.
    """

    running: ClassVar[set[_Generation]] = set()

    def __init__(self, model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> None:
        super().__init__(name="glmquant-generate", daemon=True)
        self.queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._model, self._input_ids = model, input_ids
        self._stop_asked, self._done = threading.Event(), threading.Event()
        criteria = [*(arguments.get("stopping_criteria") or ()), _Stopped(self._stop_asked)]
        self._arguments = {**arguments, "stopping_criteria": StoppingCriteriaList(criteria)}

    def start(self) -> None:
        self.running.add(self)
        super().start()

    def run(self) -> None:
        try:
            self._model.generate(self._input_ids, streamer=_Tokens(self.queue), **self._arguments)
            self.queue.put(None)
        except BaseException as error:  # whatever it was belongs to the caller
            self.queue.put(error)
        finally:
            self.running.discard(self)
            self._done.set()

    def finish(self) -> None:
        """Stop and wait, also when Ctrl-C comes meanwhile: that is raised afterwards."""
        self._stop_asked.set()
        interrupt = None
        # Not join() at once: interrupted, it takes a thread for ended that is not (Python 3.10 to 3.12).
        while not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        self.join()
        if interrupt is not None:
            raise interrupt


@atexit.register
def _finish_all() -> None:
    """Generators that nobody closed: a thread inside of torch while Python goes down aborts the process."""
    for generation in list(_Generation.running):
        generation.finish()


def generate_tokens(model: Any, input_ids: Tensor, **arguments: Any) -> Generator[int, None, None]:
    """Run ``model.generate`` in a thread and yield the ids of the answer one by one.

    Closing the iterator, also by leaving a loop over it, stops generation and waits for the thread, which
    takes as long as the token at hand. An error of `generate` is raised here.

    Args:
        model: a model with `generate`.
        input_ids: int64 [1, length].
        arguments: for `generate`; no `streamer`, and one beam.
    """
    generation = _Generation(model, input_ids, arguments)
    generation.start()
    try:
        while (row := generation.queue.get()) is not None:
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        generation.finish()
