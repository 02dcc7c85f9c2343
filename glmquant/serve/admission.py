"""How many requests fit: the memory model's answer, before anything is loaded."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint.source import ITEM_SIZES
from ..errors import DoesNotFitError
from ..memory import Memory, Model, Workload, check_context, estimate
from ..recipe import show_size

CONTEXT, BATCH = 8192, 16  # where nothing is asked for
_CHUNK = {"cpu": 256, "cuda": 2048}  # tokens of a step: large enough to keep the device busy, and no larger
_SAMPLING = 24  # bytes of float32 copies that choosing makes of each logit
_HTTP = 64 << 20  # what a process takes with FastAPI, uvicorn and their buffers; measured


@dataclass(frozen=True)
class Admission:
    """What a server admits.

    Attributes:
        slots: requests at a time.
        context: tokens of each, prompt and answer together.
        chunk: tokens that a step computes at most; None where prompts are read at once.
        memory: the prediction for all slots full.
        limit: bytes that it stays within; None where nothing is known.
    """

    slots: int
    context: int
    chunk: int | None
    memory: Memory
    limit: int | None


def admit(
    model: Model,
    place: str,
    *,
    vram: int | None = None,
    context: int | None = None,
    max_batch: int | None = None,
) -> Admission:
    """As many slots as fit, at most `max_batch`.

    Args:
        model: the checkpoint.
        place: where it runs: cpu, cuda, cuda:1.
        vram: bytes of the process; None is what is free.
        context: tokens of a request; None is the model's, or 8192 where that is more.
        max_batch: None is 16; ChatGLM-6B is always served one at a time.

    Raises:
        DoesNotFitError: not even one request does.
        UsageError: the context is longer than the model's.
    """
    context = context or min(CONTEXT, model.dims.context)
    check_context(model, context)
    device: Literal["cuda", "cpu"] = "cpu" if place == "cpu" else "cuda"
    limit = vram if vram is not None else _free(place)
    serial = model.family == "chatglm"
    chunk = None if serial else min(_CHUNK[device], context)
    most = 1 if serial else max_batch or BATCH
    slots = most
    if limit is not None:  # memory grows with each slot
        counts = range(1, most + 1)
        slots = bisect_right(
            counts, limit, key=lambda count: _memory(model, device, count, context, chunk).peak
        )
    memory = _memory(model, device, max(1, slots), context, chunk)
    if slots:
        return Admission(slots, context, chunk, memory, limit)
    assert limit is not None
    what = "memory" if device == "cpu" else "VRAM"
    raise DoesNotFitError(
        f"one request of {context} tokens needs {show_size(memory.peak)} of {what}, and "
        f"{'--vram is' if vram else 'there is'} {show_size(limit)}; lower --context, or convert to fewer bits."
    )


def _memory(
    model: Model, device: Literal["cuda", "cpu"], slots: int, context: int, chunk: int | None
) -> Memory:
    """The prediction for one request's forward pass, with the caches and logits of all."""
    workload = Workload(context, 1, "dynamic" if chunk is None else "static", chunk)
    one = estimate(model, workload, "glmquant", device)
    logits = slots * model.dims.vocab * (ITEM_SIZES[model.dtype] + _SAMPLING)
    return replace(
        one,
        cache=slots * one.cache,
        activations=one.activations + logits,
        process_base=one.process_base + _HTTP,
        load_peak=one.load_peak + _HTTP,
    )


def _free(place: str) -> int | None:
    """Bytes that nobody uses; None where the system does not tell."""
    if place != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(torch.device(place))[0])
    return min((free for free in (_free_of_machine(), free_of_container()) if free is not None), default=None)


def _free_of_machine() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = os.sysconf_names.get("SC_AVPHYS_PAGES") if hasattr(os, "sysconf_names") else None
    return None if pages is None else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_of_container(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process leave it, those of Linux' containers among them; None for any.

    Each group is within those above it. Pages of files that were not read lately count as used, but are given up when
    memory is wanted (`docker stats` and Kubernetes leave them out, too).

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, files = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, files = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container may see itself as the top, while the path is the one outside of it.
        top, group = root / mount, root / mount / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(top))):
            try:
                most = (folder / limit).read_text().strip()
                used = int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most != "max":
                found.append(max(0, int(most) - max(0, used - int(stat.get(files, 0)))))
    return min(found, default=None)
