"""What is measured, and what comes of it: plain values that travel between the processes as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """What every candidate has to do, greedily and with a cache.

    Attributes:
        prompt: tokens of the prompt.
        new: tokens that are written after it; the first of them counts to the prefill.
        batches: how many sequences at once, one measurement for each.
        warmup: runs that are not counted.
        repetitions: runs that are.
    """

    prompt: int = 256
    new: int = 64
    batches: tuple[int, ...] = (1,)
    warmup: int = 1
    repetitions: int = 3


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and what runs it; see `glmquant.bench.runtimes`."""

    path: str
    runtime: str = "glmquant"
    device: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class Trial:
    """One run: seconds to the first token, and those of the `new - 1` tokens after it."""

    batch: int
    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Result:
    """What one candidate did.

    Attributes:
        candidate: which one.
        error: why there are no figures; None if there are.
        device: where it ran.
        dtype: what it computed in.
        load_seconds: from the folder to a model that is ready, without imports.
        weight_bytes: of the weights as they lie in memory.
        memory: peak bytes, of loading and running: ``process`` is resident on a CPU, and NVML's figure on a GPU;
            ``allocated`` and ``reserved`` are torch's, on a GPU only. ``base`` is the process before it loads,
            ``cache`` the keys and values at the end of a run of the largest batch.
        trials: every counted run.
        predicted: what `glmquant.memory` says of `memory`, as `Memory.to_json`; None where it knows nothing.
    """

    candidate: Candidate
    error: str | None = None
    device: str = ""
    dtype: str = ""
    load_seconds: float = 0.0
    weight_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    predicted: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """What `to_json` gave."""
        trials = tuple(Trial(**trial) for trial in value["trials"])
        return cls(**{**value, "candidate": Candidate(**value["candidate"]), "trials": trials})

    def speeds(self, workload: Workload, batch: int) -> Speeds:
        """Medians and spreads of the runs with this batch."""
        runs = [trial for trial in self.trials if trial.batch == batch]
        return Speeds(
            Spread.of([run.first_token_seconds for run in runs]),
            Spread.of([batch * workload.prompt / run.first_token_seconds for run in runs]),
            Spread.of([batch * (workload.new - 1) / run.decode_seconds for run in runs]),
        )


@dataclass(frozen=True)
class Spread:
    """The median of several figures, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speeds:
    """Time to the first token in seconds, and tokens per second, of all sequences together."""

    first_token: Spread
    prefill: Spread
    decode: Spread
