"""Runs inside vLLM's environment, where nothing of this project is: ``python vllm_worker.py JOB ANSWER``.

JOB is a JSON file with ``model`` (a folder), ``dtype``, ``prompts`` (lists of token ids) and ``new_tokens``; ANSWER is
the JSON file to write, with the fields of `tests.engines.base.Answer`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def quantized(model: Any) -> dict[str, Any]:
    """How many weights are in memory as they were stored, and what computes them; vLLM passes its model."""
    kernels, packed = set(), 0
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for name in ("weight_packed", "qweight", "weight"):
            weight = getattr(module, name, None)
            scheme = getattr(module, "scheme", None)
            kernel = getattr(scheme, "kernel", scheme) or method
            inside = getattr(kernel, "dnnl_handler", None)  # oneDNN keeps 8-bit weights to itself
            if weight is None and inside is not None:
                packed += inside.n * inside.k
            elif weight is None or weight.dtype.is_floating_point:
                continue
            else:
                packed += weight.nbytes
            kernels.add(type(kernel).__name__)
            break
    return {"architecture": type(model).__name__, "kernels": sorted(kernels), "packed_bytes": packed}


def main() -> None:
    """See the module."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
    )
    greedy = SamplingParams(
        temperature=0,
        max_tokens=job["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=0,  # of the token itself, and no others
        prompt_logprobs=0,
    )
    prompts = job["prompts"]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    continuations = []
    for ids, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        # the first token of a prompt follows nothing
        by_step = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = [step[token].logprob for step, token in zip(by_step, [*ids[1:], *tokens], strict=True)]
        continuations.append({"prompt": ids, "tokens": tokens, "logprobs": logprobs})
    (found,) = llm.apply_model(quantized)
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    Path(sys.argv[2]).write_text(json.dumps(found | {"dtype": dtype, "continuations": continuations}))


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
