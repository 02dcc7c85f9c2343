"""Served models: tiny ones that compute, and a runner that answers as it is told; over real sockets."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers_cards
import torch
from helpers_tokenizers import scratch
from torch import Tensor

import glmquant
from glmquant.memory import Memory
from glmquant.prompts import prompt_for
from glmquant.serve.admission import Admission
from glmquant.serve.app import create_app
from glmquant.serve.engine import Engine
from glmquant.serve.jobs import Job, Update
from glmquant.serve.metrics import Metrics
from glmquant.serve.runners import Piece
from glmquant.serve.sampling import Sampling
from glmquant.serve.server import Server, build, configure, listen_on
from glmquant.serve.service import Service, Settings

NOTHING = Memory(0, 0, 0, 0, 0, 0, 0, 0, 0)


@functools.cache
def tiny_folder(name: str) -> Path:
    """A model as published, but tiny; see `helpers_cards`."""
    return helpers_cards.published(scratch() / "served", name)


@functools.cache
def tokenizer_of(name: str) -> Any:
    return glmquant.load_tokenizer(tiny_folder(name))


def tiny_model(name: str) -> Any:
    return glmquant.load(tiny_folder(name), device="cpu", dtype="float32")


@dataclass
class Script:
    """A runner that needs no model: it answers a prompt with the ids that `answer` gives for it.

    Attributes:
        answer: ids of the prompt -> ids of the answer; after them comes the stop id.
        stop: the id that ends an answer.
        delay: seconds of a step.
        gate: a step waits for it.
        poison: a step with a prompt that holds this id raises.
    """

    answer: Callable[[list[int]], Sequence[int]]
    stop: int
    vocab: int
    slots: int = 4
    context: int = 512
    chunk: int | None = 64
    delay: float = 0.0
    poison: int | None = None
    reuses: bool = False
    largest: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self._texts: dict[int, list[int]] = {}
        self._answers: dict[int, tuple[int, Sequence[int]]] = {}

    def copy(self, source: int, target: int, count: int) -> None:
        self._texts[target] = self._texts.get(source, [])[:count]

    def step(self, pieces: Sequence[Piece]) -> Tensor:
        self.gate.wait()
        time.sleep(self.delay)
        self.largest = max(self.largest, len(pieces))
        rows = []
        for piece in pieces:
            if self.poison in piece.ids:
                raise RuntimeError("poisoned")
            text = self._texts.setdefault(piece.slot, [])
            text[piece.start :] = piece.ids
            if piece.start == 0:
                self._answers.pop(piece.slot, None)
            if piece.wanted:
                if piece.slot not in self._answers:
                    self._answers[piece.slot] = len(text), self.answer(list(text))
                length, answer = self._answers[piece.slot]
                place = len(text) - length
                rows.append(answer[place] if place < len(answer) else self.stop)
        logits = torch.zeros(len(rows), self.vocab)
        logits[range(len(rows)), rows] = 30.0
        return logits


def scripted(name: str, answer: Callable[[str], str] = lambda prompt: "yes", **options: Any) -> Script:
    """A `Script` that works on texts."""
    prompt = prompt_for(tokenizer_of(name))

    def ids(asked: list[int]) -> list[int]:
        return prompt.plain(answer(prompt.tokenizer.decode(asked)))

    return Script(ids, prompt.stop_ids()[0], 200_000, **options)


def service_of(name: str, runner: Script, *, queue: int = 128, **settings: Any) -> Service:
    """A service whose model is a script."""
    prompt = prompt_for(tokenizer_of(name))
    metrics = Metrics()
    engine = Engine(runner, prompt_for(glmquant.load_tokenizer(tiny_folder(name))).decode, prompt.fallback, queue,
                    metrics.observe)  # fmt: skip
    metrics.watch(engine, runner.slots, 0, torch.device("cpu"))
    engine.start()
    stops = prompt.stop_ids()
    return Service(engine, prompt, runner.context, runner.vocab, stops, Settings(name, **settings), metrics)


def real_service(name: str, slots: int = 4, context: int = 256, chunk: int = 32, **settings: Any) -> Service:
    """A service with a tiny model that computes."""
    admission = Admission(slots, context, None if name == "chatglm-6b" else chunk, NOTHING, None)
    return build(tiny_model(name), tokenizer_of(name), admission, Settings(name, **settings))


@contextlib.contextmanager
def listening(service: Service, **options: Any) -> Iterator[str]:
    """The address of a server in this process; `options` are `create_app`'s."""
    app = create_app(service, **options)
    bound = listen_on("127.0.0.1", 0)
    server = Server(configure(app, log_level="warning"), service.engine, 5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        service.engine.stop(5)


class Heard:
    """What a job was told."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self._done = threading.Event()

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        if update.finish or update.error:
            self._done.set()

    def last(self, seconds: float = 60) -> Update:
        assert self._done.wait(seconds), "no answer"
        return self.updates[-1]


def ask(engine: Engine, ids: list[int], new: int = 16, **options: Any) -> tuple[Job, Heard]:
    """Submit a job, greedy unless `sampling` says otherwise."""
    heard = Heard()
    settings: dict[str, Any] = {
        "sampling": Sampling(0, 1), "stop_ids": frozenset(), "stop": (), **options
    }  # fmt: skip
    job = Job(ids, new, listener=heard, **settings)
    engine.reserve()
    engine.submit(job)
    return job, heard


def until(reached: Any) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)
