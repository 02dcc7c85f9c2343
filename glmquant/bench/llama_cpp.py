"""llama.cpp as a candidate: a GGUF file, run in this process by the package xllamacpp."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import SourceError, UsageError
from .cases import Candidate, Trial, Workload

_MARGIN = 8  # tokens of room beyond prompt and answer


def gguf_file(path: str) -> Path | None:
    """The GGUF file that `path` is, or that is alone in the folder; None if there is none."""
    given = Path(path).expanduser()
    if given.suffix == ".gguf":
        return given
    found = sorted(given.glob("*.gguf")) if given.is_dir() else []
    return found[0] if len(found) == 1 else None


class LlamaCpp:
    """A model in llama.cpp, with a slot for each sequence of the largest batch.

    The times are llama.cpp's own, of the slot that took longest.

    Args:
        candidate: its path is a GGUF file, or a folder that holds one.
        workload: decides how much cache there has to be.

    Raises:
        UsageError: xllamacpp is not installed.
        SourceError: there is no such file, or llama.cpp does not read it.
    """

    dtype = "GGUF"

    def __init__(self, candidate: Candidate, workload: Workload) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise UsageError(
                "llama.cpp runs through xllamacpp, which is not installed: pip install xllamacpp."
            ) from None
        file = gguf_file(candidate.path)
        if file is None or not file.is_file():
            raise SourceError(
                f"{candidate.path} holds no GGUF file; glmquant convert --format gguf writes one."
            )
        on_gpu = candidate.device != "cpu" and any(
            "GPU" in str(device["type"]) for device in xllamacpp.get_device_info()
        )
        self.device = "cuda" if on_gpu else "cpu"
        self.weight_bytes = file.stat().st_size
        slots = max(workload.batches)
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel = slots
        params.n_ctx = slots * (workload.prompt + workload.new + _MARGIN)
        params.n_gpu_layers = 999 if on_gpu else 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
        params.warmup = params.use_jinja = params.cache_prompt = False
        params.cache_ram_mib = 0
        params.verbosity = -1
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise SourceError(f"llama.cpp does not load {file} ({error}).") from None

    def run(self, workload: Workload, batch: int) -> Trial:
        """Let `batch` sequences write at the same time."""
        # Ids that every vocabulary has. The same ones for all sequences, since nothing is kept between runs.
        prompt = [10 + number % 80 for number in range(workload.prompt)]
        request = {
            "prompt": prompt, "n_predict": workload.new, "ignore_eos": True, "cache_prompt": False, "temperature": 0.0,
        }  # fmt: skip
        barrier = threading.Barrier(batch)

        def ask(number: int) -> dict[str, Any]:
            barrier.wait()
            answer: dict[str, Any] = self._server.handle_completions(request)
            return answer

        with ThreadPoolExecutor(batch) as pool:
            answers = list(pool.map(ask, range(batch)))
        for answer in answers:
            found = answer.get("timings", {})
            if (found.get("prompt_n"), found.get("predicted_n")) != (workload.prompt, workload.new):
                raise RuntimeError(f"llama.cpp answered otherwise than asked: {str(answer)[:200]}")
        times = [answer["timings"] for answer in answers]
        return Trial(
            batch, max(t["prompt_ms"] for t in times) / 1000, max(t["predicted_ms"] for t in times) / 1000
        )


def _threads() -> int:
    """As many as torch would use: cores, or what OMP_NUM_THREADS says."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) else (os.cpu_count() or 1)
