"""One candidate in a process of its own: ``python -m glmquant.bench.worker``; request on stdin, result on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import glmquant.models.chatglm
import glmquant.models.glm
from glmquant.errors import GlmquantError

from .cases import Candidate, Result, Trial, Workload
from .runtimes import RUNTIMES

_SEED = 0
# What is imported only when it is used counts to nobody's load time.
_IMPORTED = (transformers.GenerationConfig, glmquant.models.chatglm, glmquant.models.glm)


class _Clock:
    """A streamer of transformers' ``generate``: notes when the prompt and each token after it are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: object) -> None:
        """Called with ids on the CPU, so what computed them is done."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """See `put`."""


def measure(candidate: Candidate, workload: Workload) -> Result:
    """Load a candidate and let it work."""
    build = RUNTIMES[candidate.runtime]
    started = time.perf_counter()
    model = build(candidate)
    _synchronize(model)
    loaded = time.perf_counter() - started
    model.generation_config.eos_token_id = None  # everybody writes as much
    trials = []
    for batch in workload.batches:
        for number in range(workload.warmup + workload.repetitions):
            trial = _trial(model, workload, batch)
            if number >= workload.warmup:
                trials.append(trial)
    parameters = {id(p): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    return Result(
        candidate=candidate,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        load_seconds=loaded,
        weight_bytes=sum(parameters.values()),
        memory=_memory(model.device),
        trials=tuple(trials),
    )


@torch.inference_mode()
def _trial(model: Any, workload: Workload, batch: int) -> Trial:
    clock = _Clock()
    model.generate(
        _prompt(model, workload.prompt, batch),
        attention_mask=torch.ones(batch, workload.prompt, dtype=torch.long, device=model.device),
        max_length=None,
        max_new_tokens=workload.new,
        do_sample=False,
        top_p=None,
        temperature=None,
        streamer=clock,
    )
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    if len(clock.times) != workload.new + 1:
        raise RuntimeError(f"{len(clock.times) - 1} of {workload.new} tokens were written")
    return Trial(batch, first - start, last - first)


def _prompt(model: Any, length: int, batch: int) -> torch.Tensor:
    """Random ids, the same for every candidate. ChatGLM-6B wants its marks at the end."""
    generator = torch.Generator().manual_seed(_SEED)
    config = model.config
    marks = [config.gmask_token_id, config.bos_token_id] if config.model_type == "chatglm" else []
    # Special tokens have the last ids.
    ids = torch.randint(10, config.vocab_size * 9 // 10, (batch, length), generator=generator)
    if marks:
        ids[:, -2:] = torch.tensor(marks)
    return ids.to(model.device)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return {"process": int(found[1]) * 1024} if found else {}
    memory = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        memory["process"] = next(p.usedGpuMemory for p in processes if p.pid == os.getpid())
    except Exception as error:  # no package, or a container that hides processes
        print(f"NVML says nothing ({type(error).__name__}: {error})", file=sys.stderr)
    return memory


def main() -> None:
    """See the module."""
    request = json.load(sys.stdin)
    candidate = Candidate(**request["candidate"])
    workload = Workload(**{**request["workload"], "batches": tuple(request["workload"]["batches"])})
    try:
        result = measure(candidate, workload)
    except Exception as error:  # a row of the table says why
        known = isinstance(error, GlmquantError)
        reason = str(error).partition("\n")[0]
        result = Result(candidate, error=reason if known else f"{type(error).__name__}: {reason}")
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
