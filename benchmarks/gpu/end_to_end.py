"""A whole model of ChatGLM3-6B's shapes with random weights: prompts, tokens, and memory, by precision."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig

import glmquant
from glmquant.bench.runtimes import DequantizeThenMultiply
from glmquant.checkpoint.source import open_folder
from glmquant.memory import Model, Workload, estimate
from glmquant.models import decoding
from glmquant.models.glm import GlmForCausalLM
from glmquant.models.quantized import QuantizedLinear

from . import convert, timing

_PRECISIONS: dict[str, int | None] = {"bf16": None, "int4": 4, "int8": 8}
_MIB = 1 << 20


def measure(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of a prompt of 2048 tokens, tokens/s of 256 after it, bytes read a token, and memory.

    Args:
        dry: a tiny model on a CPU, to see that the program works.
        folder: not used.
    """
    prompt, answer, batches = (12, 4, (1, 2)) if dry else (2048, 256, (1, 4, 16))
    device = torch.device("cpu" if dry else "cuda")
    for name, bits in _PRECISIONS.items():
        _forget()
        started = _allocated()
        model = _random_model(dry, device)
        if bits is not None:
            model.quantize(bits, method="rtn")
        _forget()
        resident = _allocated() - started
        ways = {"graph": True, "eager": False} | ({"thudm": False} if bits == 4 else {})
        for way, graphed in ways.items():
            if way == "thudm":
                _as_thudm(model)
            for batch in batches if graphed else batches[:1]:
                with _decoding(graphed, dry):
                    found = _run(model, batch, prompt, answer)
                yield {
                    "precision": name, "way": way, "batch": batch, "resident_MiB": resident // _MIB,
                } | found  # fmt: skip
        del model


def _random_model(dry: bool, device: torch.device) -> Any:
    sizes: dict[str, Any] = (
        {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        if dry
        else {"vocab_size": 65024, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 28}
        | {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128}
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GlmConfig(
        **sizes, attention_bias=True, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope,
        pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = GlmForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(device).eval()


def _run(model: Any, batch: int, prompt: int, answer: int) -> dict[str, Any]:
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=model.device)

    def generate(new: int) -> Any:
        return model.generate(
            ids, max_new_tokens=new, min_new_tokens=new, max_length=None, do_sample=False, pad_token_id=0
        )

    with torch.inference_mode():
        started = timing.wall_seconds(lambda: generate(2))  # kernels are compiled, and graphs recorded
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        prefill = min(timing.wall_seconds(lambda: model(ids, logits_to_keep=1)) for _ in range(2))
        short, long = (timing.wall_seconds(lambda new=new: generate(new)) for new in (2, answer + 2))  # type: ignore[misc]
    a_token = (long - short) / answer
    read = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    return {
        "first_call_seconds": round(started, 2),
        "prefill_seconds": round(prefill, 4),
        "prefill_tokens/s": round(batch * prompt / prefill, 1),
        "ms/token": round(a_token * 1e3, 4),
        "tokens/s": round(batch / a_token, 1),
        "weights_GB/s": round(read / a_token / 1e9, 1),
        "peak_allocated_MiB": torch.cuda.max_memory_allocated() // _MIB
        if torch.cuda.is_available()
        else None,
        "device_used_MiB": _device_used(),
    }


@contextmanager
def _decoding(graphed: bool, dry: bool) -> Iterator[None]:
    """With the decode loop of `glmquant.models.decoding`, or without it."""
    usual = set(decoding.DEVICES)
    decoding.DEVICES.clear()
    if graphed:
        decoding.DEVICES.update({"cpu"} if dry else {"cuda"})
    try:
        yield
    finally:
        decoding.DEVICES.clear()
        decoding.DEVICES.update(usual)


def _as_thudm(model: Any) -> None:
    for name, module in [*model.named_modules()]:
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, DequantizeThenMultiply(module))


def _device_used() -> int | None:
    """MiB in use on the whole GPU, as NVML and nvidia-smi say."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) // _MIB
    except Exception:  # not installed, or not allowed
        free, total = torch.cuda.mem_get_info()
        return int(total - free) // _MIB


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_memory(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Loading, and what `glmquant.memory` predicts against what a process of its own measures.

    8 layers, because that is a third of the time; the formulas do not know the number.
    """
    context, device = (48, "cpu") if dry else (2304, "cuda")
    for name, bits in ({"int4": 4} if dry else {"int4": 4, "int8": 8}).items():
        out = folder / name
        recipe = glmquant.Recipe(bits=bits, method="rtn")
        glmquant.convert(convert.source(dry, folder), out, recipe)
        seconds = timing.wall_seconds(lambda out=out: glmquant.load(out, device=device))  # type: ignore[misc]
        _forget()
        for batch in (2,) if dry else (1, 4):
            yield {"recipe": name, "load_seconds": round(seconds, 3)} | _compare(out, device, context, batch)


def _compare(out: Path, device: str, context: int, batch: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "glmquant._measured_run", str(out), device, str(context), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    if "fault" in found:
        raise RuntimeError(found["fault"])
    model = Model.of_checkpoint(open_folder(out))
    predicted = estimate(model, Workload(context, batch), device="cpu" if device == "cpu" else "cuda")
    row = {"batch": batch, "context": context, "predicted_MiB": predicted.allocated // _MIB}
    if "allocated" in found:
        row["measured_MiB"] = found["allocated"] // _MIB
        row["error_percent"] = round(100 * (predicted.allocated / found["allocated"] - 1), 2)
    row["process_predicted_MiB"] = predicted.process // _MIB
    row["process_measured_MiB"] = found["process"] // _MIB
    return row
