"""glmquant on a CPU, for `benchmarks.cpu_decode`: a checkpoint as `glmquant.load` gives it, in a process of its own.

    python -m benchmarks.glmquant_worker FOLDER THREADS DTYPE

Answers each line ``prefill TOKENS`` or ``decode BATCH TOKENS`` on stdin with seconds on stdout; first says what it is.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import glmquant

_PROMPT = 8


class _Clock:
    """A streamer of transformers' ``generate``: notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Model:
    """What is measured is ``generate``, as a user calls it."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model: Any = glmquant.load(folder, "cpu", dtype)
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def _generate(self, batch: int, length: int, new: int) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, self.model.config.vocab_size * 9 // 10, (batch, length), generator=generator)
        clock, ones = _Clock(), torch.ones_like(ids)
        self.model.generate(ids, attention_mask=ones, max_new_tokens=new, do_sample=False, streamer=clock)
        return clock.times

    def prefill(self, length: int) -> float:
        """Seconds until the first token after a prompt."""
        started, first = self._generate(1, length, 1)
        return first - started

    def decode(self, batch: int, new: int) -> float:
        """Seconds for `new` tokens of each of `batch` sequences after the first, which comes with the prompt."""
        _, first, *_, last = self._generate(batch, _PROMPT, new + 1)
        return last - first


def main() -> None:
    """See the module."""
    torch.set_num_threads(int(sys.argv[2]))
    model = Model(sys.argv[1], sys.argv[3])
    nbytes = sum(parameter.nbytes for parameter in model.model.parameters())
    embedding = model.model.get_input_embeddings()
    looked_up = sum(parameter.nbytes for parameter in embedding.parameters())
    print(json.dumps({"bytes": nbytes, "bytes_per_token": nbytes - looked_up}), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(json.dumps(getattr(model, what)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
