"""From a folder to a server that listens, and back down in order."""

from __future__ import annotations

import asyncio
import copy
import socket
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from .. import load, load_tokenizer
from ..checkpoint.source import TORCH_NAMES, open_folder
from ..errors import UsageError
from ..memory import Model
from ..models.building import open_checkpoint
from ..models.chat import stop_ids
from ..models.loading import compute_dtype
from ..models.placement import checked_device
from ..prompts import Prompt, prompt_for
from .admission import Admission, admit
from .engine import Engine
from .metrics import Metrics
from .runners import Piece, Runner, SerialRunner, SlotRunner
from .service import PROMPT_LOG, Service, Settings


def open_model(
    out: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    adapter: str | None = None,
    vram: int | None = None,
    context: int | None = None,
    max_batch: int | None = None,
) -> tuple[Any, Any, Admission]:
    """Model, tokenizer and what is admitted; all but the memory options are as for `glmquant.load`.

    Raises:
        DoesNotFitError: there is no room for a request; nothing has been loaded.
    """
    checkpoint = open_checkpoint(out, adapter)
    tokenizer = load_tokenizer(out)
    prompt_for(
        tokenizer
    )  # a tokenizer that cannot be talked to is refused before the time for loading is spent
    place = checked_device(device)
    names = {name: stored for stored, name in TORCH_NAMES.items()}
    held = Model.of_checkpoint(open_folder(checkpoint.source.folder))
    held = replace(held, dtype=names[str(compute_dtype(dtype, checkpoint)).removeprefix("torch.")])
    admission = admit(held, str(place), vram=vram, context=context, max_batch=max_batch)
    return load(out, device=place, dtype=dtype, adapter=adapter), tokenizer, admission


def build(model: Any, tokenizer: Any, admission: Admission, settings: Settings, queue: int = 128) -> Service:
    """A model as a service, with its engine running.

    Args:
        model: what `glmquant.load` returns; it is the service's from now on.
        tokenizer: what `glmquant.load_tokenizer` returns.
        admission: see `admit`.
        settings: see `Settings`.
        queue: requests that may wait.
    """
    prompt = prompt_for(tokenizer)
    runner: Runner
    if admission.chunk is None:
        runner = SerialRunner(model, admission.context)
    else:
        runner = SlotRunner(model, admission.slots, admission.context, admission.chunk)
    metrics = Metrics()
    # Tokenizers are not made for several threads: the engine decodes with its own.
    decode = prompt_for(copy.deepcopy(tokenizer)).decode
    engine = Engine(runner, decode, prompt.fallback, queue, metrics.observe)
    metrics.watch(engine, admission.slots, admission.memory.peak, model.device)
    _warm_up(runner, prompt)
    engine.start()
    vocab = model.config.vocab_size
    return Service(engine, prompt, admission.context, vocab, stop_ids(prompt, model), settings, metrics)


def _warm_up(runner: Runner, prompt: Prompt) -> None:
    """Two tokens, so that no client waits for kernels to be compiled."""
    ids = prompt.ids("", [])
    if runner.chunk is not None:
        ids = ids[: min(runner.chunk, runner.context - 1)]
    runner.step([Piece(0, ids, 0)])
    runner.step([Piece(0, ids[-1:], len(ids))])


class Server(uvicorn.Server):
    """uvicorn that answers 503 while it finishes what runs, and ends then; at a second signal, at once.

    Args:
        config: of uvicorn.
        engine: what has to finish.
        patience: seconds for that.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, patience: float) -> None:
        super().__init__(config)
        self._engine, self._patience = engine, patience
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that asks to end."""
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._leaving = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self._engine.drain()
        end = time.monotonic() + self._patience
        while not self._engine.idle and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def configure(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """Uvicorn's settings. Idle connections stay longer than clients keep them, so that none is closed in use."""
    log = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["loggers"][PROMPT_LOG] = {"handlers": ["default"], "level": "INFO"}
    return uvicorn.Config(
        app,
        log_config=log,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        **options,
    )


def listen_on(host: str, port: int) -> socket.socket:
    """A bound socket; nothing can connect yet.

    Raises:
        UsageError: the address is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or --port."
        ) from None
    return bound
