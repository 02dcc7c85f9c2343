"""What an engine is, and what it says about a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .checkpoints import Checkpoint
from .environments import Environment


class EngineFailed(Exception):
    """The engine refused a checkpoint or died; the message is its own, shortened."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the engine made of it, greedily.

    Attributes:
        prompt: token ids.
        tokens: the ids that follow.
        logprobs: of every token but the first of the prompt, and of every token that follows; or of these alone.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Answer:
    """What an engine did with a checkpoint.

    Attributes:
        architecture: the class with which it runs the model.
        dtype: of activations, as torch calls it.
        kernels: what computes quantized matrices; empty if none is quantized.
        packed_bytes: quantized matrices as they lie in its memory, without scales; None where it does not tell.
        continuations: one for each prompt.
        banned: ids that it could not choose, whatever their logit.
    """

    architecture: str
    dtype: str
    kernels: Sequence[str]
    packed_bytes: int | None
    continuations: Sequence[Continuation]
    banned: Sequence[int] = ()


class Engine(Protocol):
    """An engine that can be installed here.

    Attributes:
        name: as ``--only`` spells it.
        environment: what it lives in.
        checkpoints: what is tried on it.
    """

    name: str
    environment: Environment
    checkpoints: Sequence[Checkpoint]

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""

    def answer(
        self, checkpoint: Checkpoint, folder: Path, prompts: Sequence[Sequence[int]], work: Path
    ) -> Answer:
        """Load `folder` and continue the prompts. `work` is for files of the engine.

        Raises:
            EngineFailed: it could not.
        """
