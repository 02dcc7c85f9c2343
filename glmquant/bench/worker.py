"""One candidate in a process of its own: ``python -m glmquant.bench.worker``; request on stdin, result on stdout."""

from __future__ import annotations

import json
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

from .._measured_run import gpu_process_bytes
from ..models import decoding, step
from .cases import Candidate, Result, Trial, Workload
from .llama_cpp import LlamaCpp
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


class _Generating:
    """A model with transformers' ``generate``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        parameters = {id(p): p.nbytes for p in [*model.parameters(), *model.buffers()]}
        self.weight_bytes = sum(parameters.values())
        self.cache_bytes = 0
        model.generation_config.eos_token_id = None  # everybody writes as much

    @torch.inference_mode()
    def run(self, workload: Workload, batch: int) -> Trial:
        """Write what is asked for."""
        clock = _Clock()
        model: Any = self.model
        # Who asks `generate` for its cache is not given tokens the fast way, which is what users get.
        fast = model.device.type in decoding.DEVICES and isinstance(model, decoding.DecodingMixin)
        fast = fast and step.why_not(model) is None
        done = self.model.generate(
            _prompt(self.model, workload.prompt, batch),
            attention_mask=torch.ones(batch, workload.prompt, dtype=torch.long, device=self.model.device),
            max_length=None,
            max_new_tokens=workload.new,
            do_sample=False,
            top_p=None,
            temperature=None,
            streamer=clock,
            return_dict_in_generate=not fast,
        )
        if fast:
            held = decoding.cache_bytes(model)
        else:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in done.past_key_values.layers)
        self.cache_bytes = max(self.cache_bytes, held)
        start, first, last = clock.times[0], clock.times[1], clock.times[-1]
        if len(clock.times) != workload.new + 1:
            raise RuntimeError(f"{len(clock.times) - 1} of {workload.new} tokens were written")
        return Trial(batch, first - start, last - first)


def measure(candidate: Candidate, workload: Workload) -> Result:
    """Load a candidate and let it work."""
    base = _resident() if _on_cpu(candidate.device) else _base_of_gpu(candidate.device)
    started = time.perf_counter()
    runner: _Generating | LlamaCpp
    if candidate.runtime == "llama.cpp":
        runner = LlamaCpp(candidate, workload)
    else:
        runner = _Generating(RUNTIMES[candidate.runtime](candidate))
        _synchronize(runner.model)
    loaded = time.perf_counter() - started
    trials = []
    for batch in workload.batches:
        for number in range(workload.warmup + workload.repetitions):
            trial = runner.run(workload, batch)
            if number >= workload.warmup:
                trials.append(trial)
    memory = {"base": base, **_peaks(runner)}
    if isinstance(runner, _Generating):
        memory["cache"] = runner.cache_bytes
    return Result(
        candidate=candidate,
        device=runner.device,
        dtype=runner.dtype,
        load_seconds=loaded,
        weight_bytes=runner.weight_bytes,
        memory={name: nbytes for name, nbytes in memory.items() if nbytes is not None},
        trials=tuple(trials),
    )


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


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _base_of_gpu(device: str) -> int | None:
    """What the process takes on a GPU once it has a CUDA context."""
    chosen = torch.device("cuda" if device == "auto" else device)
    torch.zeros(1, device=chosen)
    return gpu_process_bytes(chosen)


def _resident() -> int | None:
    return _status("VmRSS")


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def _peaks(runner: _Generating | LlamaCpp) -> dict[str, int | None]:
    if runner.device == "cpu":
        return {"process": _status("VmHWM")}
    device = torch.device(runner.device)
    memory = {"process": gpu_process_bytes(device)}
    if isinstance(runner, _Generating):
        memory["allocated"] = torch.cuda.max_memory_allocated(device)
        memory["reserved"] = torch.cuda.max_memory_reserved(device)
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
