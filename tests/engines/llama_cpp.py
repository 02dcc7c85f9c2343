"""llama.cpp, as the package ``xllamacpp`` brings it: a server within the worker's process, without a network."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import gguf
from tokenizers import Tokenizer

from .base import Answer, Continuation, EngineFailed
from .checkpoints import NEW_TOKENS, PROMPTS, Checkpoint, for_llama_cpp
from .environments import Environment

_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_SECONDS = 600
# Their ids must be those of the folder's own tokenizer.
TEXTS = (
    *PROMPTS,
    "sophisticated eopatra 12345  6.7",
    "naïve façade — 你好，世界 👋\n\n\ttab",
    "<|im_start|>user<|im_end|>",
)


class LlamaCpp:
    """See the module and `Engine`."""

    name = "llama.cpp"
    checkpoints: Sequence[Checkpoint] = for_llama_cpp()
    environment = Environment(name="llama.cpp", first=("numpy==2.4.6",), package="xllamacpp==2026.10.11549")

    def missing(self) -> str | None:
        """See `Engine`."""
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            return "its package is for Linux on x86-64"
        return None

    def answer(
        self, checkpoint: Checkpoint, folder: Path, prompts: Sequence[Sequence[int]], work: Path
    ) -> Answer:
        """See `Engine`."""
        job, result = work / "llama-job.json", work / "llama-answer.json"
        result.unlink(missing_ok=True)
        job.write_text(
            json.dumps(
                {
                    "model": str(folder / "model.gguf"),
                    "prompts": prompts,
                    "new_tokens": NEW_TOKENS,
                    "texts": TEXTS,
                }
            )
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            process = subprocess.run(
                [self.environment.python, _WORKER, job, result],
                capture_output=True, text=True, env=environment, timeout=_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise EngineFailed(f"no answer after {_SECONDS} seconds") from None
        if process.returncode or not result.exists():
            raise EngineFailed(f"llama.cpp ended with status {process.returncode}: {process.stderr[-400:]}")
        document = json.loads(result.read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text, ids in zip(TEXTS, document["ids"], strict=True):
            if ids != tokenizer.encode(text).ids:
                raise EngineFailed(
                    f"its tokenizer gives {ids} for {text!r}, ours {tokenizer.encode(text).ids}"
                )
        texts = [Continuation(**text) for text in document["continuations"]]
        reader = gguf.GGUFReader(folder / "model.gguf")  # what it has run is what the file says
        architecture = reader.fields["general.architecture"].contents()
        types = sorted({tensor.tensor_type.name for tensor in reader.tensors} - {"F16", "F32"})
        # Told to go on, it never chooses what would end the text.
        ends = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_end|>")]
        return Answer(architecture, checkpoint.dtype, types, None, texts, banned=ends)
