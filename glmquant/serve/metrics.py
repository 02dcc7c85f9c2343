"""Prometheus metrics of a server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import Engine
from .jobs import Job, Update

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


class Metrics:
    """What a server counts; a registry of its own, so that several may live in a process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)

        def histogram(name: str, about: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"glmquant_{name}", about, buckets=tuple(buckets), registry=self._registry)

        self.requests = Counter(
            "glmquant_http_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._answers = Counter("glmquant_answers", "How answers ended.", ["reason"], registry=self._registry)
        self._queue = histogram("queue_seconds", "From request to slot.", _SECONDS)
        self._first = histogram("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._per_token = histogram("time_per_token_seconds", "Between tokens, mean of an answer.", _SECONDS)
        self._whole = histogram("answer_seconds", "From request to the end of the answer.", _SECONDS)
        self._prompt = histogram("prompt_tokens_per_request", "Tokens of prompts.", _TOKENS)
        self._generated = histogram("generated_tokens_per_request", "Tokens of answers.", _TOKENS)
        self.mean_seconds = 1.0

    def watch(self, engine: Engine, slots: int, planned_bytes: int, device: Any) -> None:
        """Report the state of an engine, too."""
        self._registry.register(_EngineCollector(engine, slots, planned_bytes, device))

    def observe(self, job: Job, update: Update) -> None:
        """Note a job that ended."""
        now = time.monotonic()
        if job.cancelled:
            self._answers.labels("cancelled").inc()
            return
        self._answers.labels(update.finish or type(update.error).__name__).inc()
        if update.finish is None:
            return
        seconds = now - job.submitted
        self.mean_seconds += 0.1 * (seconds - self.mean_seconds)
        self._queue.observe(job.started - job.submitted)
        self._first.observe(job.first - job.submitted)
        self._whole.observe(seconds)
        self._prompt.observe(len(job.ids))
        self._generated.observe(update.tokens)
        if update.tokens > 1:
            self._per_token.observe((now - job.first) / (update.tokens - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, slots: int, planned_bytes: int, device: Any) -> None:
        self._engine, self._slots, self._planned, self._device = engine, slots, planned_bytes, device

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        engine, counts = self._engine, self._engine.counts
        for name, value, about in (
            ("queue_requests", engine.waiting, "Requests that wait for a slot."),
            ("running_requests", engine.running, "Requests in slots."),
            ("slots", self._slots, "Requests that can run at a time."),
            ("memory_planned_bytes", self._planned, "Predicted peak of the process."),
            *_memory(self._device),
        ):
            yield GaugeMetricFamily(f"glmquant_{name}", about, value=value)
        for name, value, about in (
            ("prompt_tokens", counts.prompt_tokens, "Tokens of prompts that were computed."),
            ("reused_prompt_tokens", counts.reused_tokens, "Tokens of prompts that were in memory already."),
            ("generated_tokens", counts.generated_tokens, "Tokens of answers."),
            ("steps", counts.steps, "Forward passes."),
        ):
            yield CounterMetricFamily(f"glmquant_{name}", about, value=value)


def _memory(device: Any) -> Iterator[tuple[str, int, str]]:
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        yield "memory_resident_bytes", int(found[1]) * 1024, "Resident memory of the process."
    if device.type == "cuda":
        import torch

        yield "memory_allocated_bytes", torch.cuda.memory_allocated(device), "GPU memory in tensors."
        yield "memory_reserved_bytes", torch.cuda.memory_reserved(device), "GPU memory held by the allocator."
