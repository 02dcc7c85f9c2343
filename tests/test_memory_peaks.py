"""Predicted peaks against what torch's allocator gave out and what the process held."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from helpers_sources import CHATGLM, CHATGLM2, random_tensors, write_model
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.profiler import ProfilerActivity, profile

import glmquant
from glmquant import Recipe, convert
from glmquant._check import check
from glmquant.checkpoint.source import open_folder
from glmquant.memory import Model, Workload, estimate
from glmquant.models import decoding
from glmquant.models.step import DecodeStep

LATER = {
    **CHATGLM2, "hidden_size": 512, "ffn_hidden_size": 1792, "kv_channels": 128, "num_attention_heads": 4,
    "padded_vocab_size": 4000, "seq_length": 4096, "torch_dtype": "float16",
}  # fmt: skip
WIDE_HEADS = {**LATER, "num_attention_heads": 10, "ffn_hidden_size": 640}
FIRST = {
    **CHATGLM, "hidden_size": 512, "inner_hidden_size": 2048, "vocab_size": 4000, "max_sequence_length": 2048,
    "bos_token_id": 244, "eos_token_id": 245, "gmask_token_id": 241, "mask_token_id": 240, "pad_token_id": 3,
}  # fmt: skip
CONFIGS = {"later": LATER, "wide-heads": WIDE_HEADS, "first": FIRST}
CASES: dict[str, tuple[str, Recipe | None]] = {
    f"{kind}-{name}": (kind, recipe)
    for kind in CONFIGS
    for name, recipe in {"16-bit": None, "int4": Recipe(method="rtn", group_size=32)}.items()
} | {
    "later-nf4": ("later", Recipe(format="bitsandbytes")),
    "wide-heads-nf4": ("wide-heads", Recipe(format="bitsandbytes")),
    "later-q4_1": ("later", Recipe(format="gguf", symmetric=False, method="rtn")),
}


def folder_of(tmp_path: Path, kind: str, recipe: Recipe | None) -> Path:
    config: dict[str, Any] = CONFIGS[kind]
    tensors = random_tensors(config)
    if kind == "first":
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    source = write_model(tmp_path / "source", config, tensors)
    if recipe is None:
        return source
    return convert(source, tmp_path / "out", recipe).out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """oneDNN's products in bfloat16 take scratch for every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocations(work: Callable[[], object], tmp_path: Path) -> list[int]:
    """Bytes that the CPU allocator gave out and, negative, took back during `work`, in their order."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return [event["args"]["Bytes"] for event in events]


def allocated_peak(model: Any, ids: torch.Tensor, tmp_path: Path) -> int:
    """Most bytes that the CPU allocator had given out while a prompt and a token were computed."""
    options = {"max_length": None, "do_sample": False}
    model.generate(ids[:, -8:], max_new_tokens=2, min_new_tokens=2, **options)
    decoding._steps.pop(model, None)  # whose cache is for the next request like it
    work = lambda: model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)  # noqa: E731
    return max(accumulate(allocations(work, tmp_path)))


def scratch(model: Any, tokens: int, tmp_path: Path) -> int:
    """The most that a product of this model, or torch's attention, takes beyond its result: a CPU's, no model's."""
    taken = [0]
    config = model.config
    ffn = config.inner_hidden_size if config.model_type == "chatglm" else config.intermediate_size
    for columns in {config.hidden_size, config.num_attention_heads * 128, ffn}:
        rows = min(config.hidden_size, (1 << 20) // columns)  # as of a tile
        x, weight = (torch.ones(n, columns, dtype=model.dtype) for n in (tokens, rows))
        given = sum(n for n in allocations(lambda x=x, w=weight: x @ w.t(), tmp_path) if n > 0)
        taken.append(given - tokens * rows * x.itemsize)
    query = torch.ones(1, 1, tokens // 2, 128)  # of two sequences; `_attend` has them in float32
    given = sum(
        n for n in allocations(lambda: attention(query, query, query, is_causal=True), tmp_path) if n > 0
    )
    return max(*taken, given - query.nbytes)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("kind", "recipe"), CASES.values(), ids=CASES.keys())
def test_activations_are_what_the_allocator_gave_out(
    kind: str, recipe: Recipe | None, dtype: str, tmp_path: Path
) -> None:
    if kind == "first" and recipe is not None:
        recipe = Recipe(method="rtn")
    folder = folder_of(tmp_path, kind, recipe)
    name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype]
    model = glmquant.load(folder, device="cpu", dtype=name)
    ids = torch.full((2, 511), 12)
    if kind == "first":
        ids[:, -2:] = torch.tensor([241, 244])
    held = replace(Model.of_checkpoint(open_folder(folder)), dtype=dtype)
    predicted = estimate(held, Workload(512, 2, prompt=511), device="cpu")
    found = allocated_peak(model, ids, tmp_path)
    least = found - scratch(model, ids.numel(), tmp_path)
    assert 0.995 * least <= predicted.allocated - predicted.resident <= 1.005 * found


def test_a_cache_on_a_gpu_that_grows_takes_what_is_predicted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "later", None)
    loaded = glmquant.load(folder, device="cpu")
    sizes = []

    def grow() -> None:
        step = DecodeStep(loaded, 2, 600)
        sizes.append(step.cache_bytes)
        step._grow(1280)

    found = max(accumulate(allocations(grow, tmp_path)))
    model = Model.of_checkpoint(open_folder(folder))
    predicted = estimate(model, Workload(1100, 2, prompt=88), device="cuda")  # room for 768, then for 1280
    assert predicted.cache + sizes[0] // 2 <= found < predicted.cache + sizes[0] // 2 + 100  # of its counters
    assert predicted.activations >= sizes[0] // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "dtype", "context", "batch"),
    [
        (None, torch.bfloat16, 1024, 2),
        (Recipe(method="rtn"), torch.bfloat16, 1024, 2),
        (Recipe(method="rtn"), torch.float16, 4096, 1),
        (Recipe(format="bitsandbytes"), torch.float16, 1024, 1),
    ],
    ids=["16-bit", "int4", "int4-half-long", "nf4-half"],
)
def test_resident_memory_of_a_fresh_process(
    recipe: Recipe | None, dtype: torch.dtype, context: int, batch: int, tmp_path: Path
) -> None:
    config = {
        **CHATGLM2, "num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 3456, "kv_channels": 128,
        "num_attention_heads": 8, "padded_vocab_size": 49152, "seq_length": 4096,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    folder = write_model(tmp_path / "source", config, random_tensors(config, dtype))
    if recipe is not None:
        folder = convert(folder, tmp_path / "out", recipe).out
    errors: list[float] = []
    # What malloc holds beyond what is in use differs by 5 % from run to run: the median of five counts.
    while len(errors) < 5:
        found = check(folder, memory_limit=2**40, context=context, batch=batch, device="cpu", measure=True)
        assert found.ok
        errors.append(found.prediction_error["process"])
        if sum(abs(error) < 0.05 for error in errors) == 3:
            break  # which the median is among, whatever the others
    assert abs(median(errors)) < 0.05, f"{errors}: {found.to_json()}"
