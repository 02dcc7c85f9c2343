"""llama.cpp through llama-cpp-python, for `benchmarks.cpu_decode`; run by the Python that has it, without glmquant.

    python llama_worker.py MODEL.gguf THREADS CONTEXT

Answers each line ``prefill TOKENS`` or ``decode BATCH TOKENS`` on stdin with seconds on stdout; first says what it is.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import llama_cpp as llama

_PROMPT = 8
_LARGEST_BATCH = 4


class Model:
    """A GGUF and a context for it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context * _LARGEST_BATCH
        parameters.n_batch = parameters.n_ubatch = context
        parameters.n_seq_max = _LARGEST_BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, parameters)
        self.greedy = llama.llama_sampler_init_greedy()

    def _run(self, tokens: list[list[int]], start: int) -> list[int]:
        """Compute one step of several sequences from position `start` on; returns their next tokens."""
        batch = llama.llama_batch_init(sum(map(len, tokens)), 0, 1)
        last, count = [], 0
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, start + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = offset == len(ids) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if llama.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        found = [llama.llama_sampler_sample(self.greedy, self.context, row) for row in last]
        llama.llama_batch_free(batch)
        return found

    def _prompt(self, batch: int, length: int) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        chosen = random.Random(0)
        return [
            [chosen.randrange(10, self.vocabulary * 9 // 10) for _ in range(length)] for _ in range(batch)
        ]

    def prefill(self, length: int) -> float:
        """Seconds until the first token after a prompt."""
        prompt = self._prompt(1, length)
        started = time.perf_counter()
        self._run(prompt, 0)
        return time.perf_counter() - started

    def decode(self, batch: int, new: int) -> float:
        """Seconds for `new` tokens of each of `batch` sequences after the first, which comes with the prompt."""
        tokens = self._run(self._prompt(batch, _PROMPT), 0)
        started = time.perf_counter()
        for step in range(new):
            tokens = self._run([[token] for token in tokens], _PROMPT + step)
        return time.perf_counter() - started


def main() -> None:
    """See the module."""
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = Model(path, threads, context)
    system: Any = llama.llama_print_system_info()
    print(json.dumps({"llama-cpp-python": llama.__version__, "features": system.decode()}), flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(json.dumps(getattr(model, what)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
