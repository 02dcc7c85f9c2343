"""The model as the routes see it: text in, updates of an answer out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..prompts import Prompt
from ..prompts.base import checked_text
from .engine import Engine
from .errors import ApiError, from_engine
from .jobs import Job, Refused, TimedOut, Update
from .metrics import Metrics
from .sampling import Sampling

# No token of the published vocabularies stands for more characters: what is longer cannot fit, and need not be encoded.
_CHARACTERS = 128
PROMPT_LOG = "glmquant.serve.prompts"
_HEADSTART = 5.0  # seconds in which an error still gets its own status


@dataclass(frozen=True)
class Settings:
    """What the operator chose.

    Attributes:
        name: of the model.
        strict_model: refuse requests for another name.
        timeout: seconds for an answer, waiting included.
        log_prompts: write prompts and answers to the log.
    """

    name: str
    strict_model: bool = False
    timeout: float = 600.0
    log_prompts: bool = False


class Service:
    """See the module.

    Args:
        engine: runs the model.
        prompt: its format; its tokenizer is used in one thread at a time.
        context: tokens of prompt and answer together.
        vocab: tokens that the model knows.
        stop_ids: end an answer.
        settings: see `Settings`.
        metrics: see `Metrics`.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        context: int,
        vocab: int,
        stop_ids: Sequence[int],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.engine, self.prompt, self.context = engine, prompt, context
        self.settings, self.metrics = settings, metrics
        self.created = int(time.time())
        self._vocab, self._stop_ids = vocab, frozenset(stop_ids)
        # Tokenizers are not made for several threads, and long texts take their time.
        self._encoder = ThreadPoolExecutor(1, "glmquant-encode")
        self._log = logging.getLogger(PROMPT_LOG)

    @property
    def most_characters(self) -> int:
        """A longer prompt has too many tokens for certain."""
        return self.context * _CHARACTERS

    def check_model(self, name: str | None) -> None:
        """Refuse another model than ours where that is wanted."""
        if self.settings.strict_model and name != self.settings.name:
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.settings.name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip

    @contextlib.contextmanager
    def reserve(self, *characters: int) -> Iterator[Place]:
        """Places in the queue for prompts with so many characters each; what is not used is given back.

        Raises:
            ApiError: a prompt is too long for certain, there are too many, too many requests wait, or the server is
                about to end.
        """
        if max(characters) > self.most_characters:
            raise self._too_long(f"over {self.context}")
        if len(characters) > self.engine.places:
            raise ApiError(
                400,
                f"this server takes {self.engine.places} prompts at once, not {len(characters)}; send fewer.",
                param="prompt",
                code="invalid_value",
            )
        try:
            self.engine.reserve(len(characters))
        except Refused as error:
            raise self.refusal(error) from None
        place = Place(self, len(characters))
        try:
            yield place
        finally:
            self.engine.release(place.left)

    async def encode(self, ids: Callable[[], list[int]], seconds: float) -> list[int]:
        """The ids of a prompt, checked.

        Raises:
            ApiError: they do not fit, cannot be, or take longer than `seconds`.
        """

        def checked() -> list[int]:
            found = ids()
            self.prompt.check(found)
            return found

        try:
            coming = asyncio.get_running_loop().run_in_executor(self._encoder, checked)
            found = await asyncio.wait_for(coming, seconds)
        except asyncio.TimeoutError:
            raise self.refusal(TimedOut("the answer took longer than this server allows.")) from None
        except UsageError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        if not found:
            raise ApiError(400, "the prompt is empty.", param="prompt", code="invalid_value")
        if len(found) >= self.context:
            raise self._too_long(str(len(found)))
        if min(found) < 0 or max(found) >= self._vocab:
            raise ApiError(400, f"the prompt has ids beyond the model's {self._vocab}.", code="invalid_value")
        return found

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The ids of a text to continue, with the special tokens that every text has."""
        if isinstance(prompt, list):
            return prompt
        tokenizer = self.prompt.tokenizer
        checked_text(prompt, "the prompt")
        return list(tokenizer.encode(prompt, split_special_tokens=self.prompt.kind != "template"))

    def _too_long(self, count: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {count} tokens; prompt and answer together may have {self.context} here. Shorten it.",
            param="messages",
            code="context_length_exceeded",
        )

    def job(
        self,
        ids: list[int],
        *,
        max_new_tokens: int | None,
        temperature: float | None,
        top_p: float | None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        repetition_penalty: float | None = None,
    ) -> Job:
        """A request, with the model's settings where it has none, and nobody who listens."""
        room = self.context - len(ids)
        defaults = self.prompt.sampling
        sampling = Sampling(
            defaults.temperature if temperature is None else temperature,
            defaults.top_p if top_p is None else top_p,
            seed,
            repetition_penalty or 1.0,
        )
        limit = room if max_new_tokens is None else min(room, max_new_tokens)
        return Job(ids, limit, sampling, self._stop_ids, tuple(stop), lambda update: None)

    def refusal(self, error: Refused) -> ApiError:
        """An error of the engine as an answer."""
        wait = self.metrics.mean_seconds * (1 + self.engine.waiting / max(1, self.engine.running))
        return from_engine(error, min(60, max(1, math.ceil(wait))))

    def log(self, what: str, value: object) -> None:
        """Write down what was said, where that is wanted."""
        if self.settings.log_prompts:
            self._log.info("%s %s", what, value)


class Place:
    """Places in the queue that prompts have while they are encoded, and the time that their answers may take.

    Attributes:
        left: places not used yet.
    """

    def __init__(self, service: Service, count: int) -> None:
        self._service, self.left = service, count
        self._since = time.monotonic()
        self._deadline = self._since + service.settings.timeout

    async def encode(self, ids: Callable[[], list[int]]) -> list[int]:
        """See `Service.encode`."""
        return await self._service.encode(ids, self._deadline - time.monotonic())

    def submit(self, ids: list[int], **options: Any) -> Ticket:
        """Queue a request; `options` are `Service.job`'s.

        Raises:
            ApiError: the server is about to end.
        """
        ticket = Ticket(self._service, self._service.job(ids, **options))
        job = ticket.job
        job.submitted, job.deadline = self._since, self._deadline
        try:
            self._service.engine.submit(job)
        except Refused as error:
            raise self._service.refusal(error) from None
        self.left -= 1
        return ticket


class Ticket:
    """A request in the engine, as seen from the event loop."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self.job = service, job
        job.listener = self.listen
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._latest = Update()

    def listen(self, update: Update) -> None:
        """For the engine; a client that reads slowly finds several updates in one."""
        self._latest = update
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._changed.set)

    async def updates(self) -> AsyncIterator[Update]:
        """The answer as it grows; the last one has `finish`. Leaving early cancels.

        Raises:
            ApiError: there will be none.
        """
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                update = self._latest
                if update.error is not None:
                    raise self._service.refusal(update.error)
                yield update
                if update.finish is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Forget it."""
        self._service.engine.cancel(self.job)

    async def wait(self, seconds: float = _HEADSTART) -> None:
        """Wait for the first update, or some seconds.

        Raises:
            ApiError: there will be no answer.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)
        if self._latest.error is not None:
            raise self._service.refusal(self._latest.error)

    async def last(self) -> Update:
        """The whole answer.

        Raises:
            ApiError: there will be none.
        """
        *_, last = [update async for update in self.updates()]
        return last
