"""``vllm serve``, as the README has it, against `glmquant.load`: the same greedy tokens over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch

import glmquant

from .base import EngineFailed
from .checkpoints import NEW_TOKENS
from .environments import Environment
from .reference import limits
from .vllm_cpu import SETTINGS

_SECONDS = 300  # to load; a minute is usual


def compare(
    folder: Path, environment: Environment, prompts: Sequence[Sequence[int]], work: Path
) -> tuple[list[str], str]:
    """Serve `folder` with vLLM, ask it all prompts at once, and read its answers with our own runtime.

    Returns:
        What is wrong, and figures.

    Raises:
        EngineFailed: it does not start, or does not answer.
    """
    with _vllm(folder, environment, work) as address:
        body = {
            "model": "served", "prompt": [list(ids) for ids in prompts], "max_tokens": NEW_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=_SECONDS)
        if answer.status_code != 200:
            raise EngineFailed(f"vllm serve answered {answer.status_code}: {answer.text[:300]}")
        texts = [choice["token_ids"] for choice in sorted(answer.json()["choices"], key=lambda c: c["index"])]
    model = glmquant.load(folder, device="cpu", dtype="float32")
    clear, faults = _judged(model, prompts, texts)
    steps = sum(map(len, texts))
    if clear < steps / 2 or steps != NEW_TOKENS * len(prompts):
        faults.append("too few steps could be judged")
    # The control: one layer out of thirty gets its inputs with the two of each pair exchanged.
    layer = model.get_submodule("model.layers.15.input_layernorm")
    layer.register_forward_hook(lambda module, inputs, out: out.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    noticed = len(_judged(model, prompts, texts)[1])
    if not noticed:
        faults.append("the comparison did not notice a damaged layer")
    return faults[
        :3
    ], f"{clear} of {steps} clear, all of these the same; {noticed} not, once a layer is damaged"


def _judged(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[int, list[str]]:
    """How many steps are clear, and which of these went another way."""
    gap_limit, _ = limits("bfloat16")
    clear, faults = 0, []
    for prompt, tokens in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        best, ids = logits.topk(2)
        for step, token in enumerate(tokens):
            if best[step, 0] - best[step, 1] > gap_limit:
                clear += 1
                if token != ids[step, 0]:
                    faults.append(f"token {step} is {token}, and {int(ids[step, 0])} is clearly likelier")
    return clear, faults


@contextmanager
def _vllm(folder: Path, environment: Environment, work: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM_"))}
    # What `vllm serve` runs; that command itself asks for a distribution named vllm, and this one is named vllm-cpu.
    module = "vllm.entrypoints.openai.api_server"
    command = [environment.python, "-m", module, "--model", folder, "--port", str(port), "--host", "127.0.0.1",
               "--served-model-name", "served", "--max-model-len", "512", "--enforce-eager"]  # fmt: skip
    log = work / "vllm-serve-log.txt"
    settings = inherited | SETTINGS | {"VLLM_CACHE_ROOT": str(work / "vllm-cache")}
    del settings["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server has its engine in a process of its own
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream, env=settings) as process,
    ):
        try:
            end = time.monotonic() + _SECONDS
            while time.monotonic() < end and process.poll() is None:
                with suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                time.sleep(0.5)
            else:
                lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
                raise EngineFailed(f"vllm serve did not start: {' '.join(lines[-2:]) or 'it took too long'}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
