"""Runs inside llama.cpp's environment, where nothing of this project is: ``python llama_cpp_worker.py JOB ANSWER``.

JOB is a JSON file with ``model`` (a GGUF file), ``prompts`` (lists of token ids), ``new_tokens`` and ``texts``; ANSWER
is the JSON file to write: ``continuations``, as `tests.engines.base.Continuation` has them, and ``ids`` of the texts.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main() -> None:
    """See the module."""
    import xllamacpp  # type: ignore[import-not-found]

    job = json.loads(Path(sys.argv[1]).read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path = job["model"]
    settings.n_ctx = 512
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.port = 0  # any that is free
    server = xllamacpp.Server(settings)

    def ask(path: str, **question: Any) -> dict[str, Any]:
        data = json.dumps(question).encode()
        request = urllib.request.Request(
            server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found

    continuations = []
    for ids in job["prompts"]:
        said = ask(
            "/completion",
            prompt=ids,
            n_predict=job["new_tokens"],
            temperature=0,
            ignore_eos=True,
            n_probs=1,
            return_tokens=True,
            cache_prompt=False,
        )
        steps = said["completion_probabilities"]
        tokens = [step["id"] for step in steps]
        continuations.append(
            {"prompt": ids, "tokens": tokens, "logprobs": [step["logprob"] for step in steps]}
        )
    ids = [
        ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
        for text in job["texts"]
    ]
    Path(sys.argv[2]).write_text(json.dumps({"continuations": continuations, "ids": ids}))


if __name__ == "__main__":
    main()
