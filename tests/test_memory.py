"""The memory model against real files, real parameters and real caches, and its totals against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_convert import small_source
from helpers_sources import CHATGLM, HEADERS, Header, HeaderSource, random_tensors, write_model

import glmquant
from glmquant import Recipe, SourceError, UsageError, convert, families
from glmquant._recipes import possible_recipes
from glmquant.checkpoint.source import open_folder
from glmquant.memory import Model, Workload, estimate, longest_context
from glmquant.memory_cache import cache_bytes, capacities
from glmquant.models import decoding
from glmquant.models.arranging import arrange
from glmquant.models.step import DecodeStep
from glmquant.plan import make_plan

GIB = 2**30


def full_size(name: str, recipe: Recipe) -> Model:
    source = HeaderSource(Header.load(name))
    return Model.of_plan(make_plan(source, recipe), families.stated_dtype(source.config))


def first_generation(folder: Path) -> Path:
    tensors = random_tensors(CHATGLM)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    return write_model(folder, {**CHATGLM, "bos_token_id": 90, "eos_token_id": 91}, tensors)


def resident(model: Any) -> int:
    return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())


@pytest.fixture(scope="module", params=["first", "later"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return first_generation(folder) if request.param == "first" else small_source(folder)


def test_predicted_bytes_are_those_of_files_and_parameters(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = list(possible_recipes(open_folder(source)))
    assert len(recipes) in (3, 30)  # THUDM's two and 16 bit; and all other formats
    recipes += [replace(r, quantize_embeddings=True, quantize_head=r.format != "cpm") for r in recipes[:1]]
    for number, recipe in enumerate(recipes):
        out = tmp_path / str(number)
        fast = recipe.bits != 16 and recipe.format != "bitsandbytes"
        plan = convert(source, out, replace(recipe, method="rtn" if fast else None)).plan
        dtype = families.stated_dtype(open_folder(source).config)
        planned, found = Model.of_plan(plan, dtype), Model.of_checkpoint(open_folder(out))
        assert planned == replace(found, family=planned.family), recipe  # native folders are glm
        assert found.file_bytes == sum(path.stat().st_size for path in open_folder(out).files)
        model = glmquant.load(out, device="cpu")
        assert estimate(found, Workload(16), device="cpu").resident == resident(model), recipe
        with monkeypatch.context() as patched:  # the weights in the order of a GPU's kernels
            patched.setattr("glmquant.ops.triton.why_not", lambda device: None)
            arrange(model)
        assert estimate(found, Workload(16), device="cuda").resident == resident(model), recipe


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_predicted_cache_is_the_real_one(tmp_path: Path, kind: str, batch: int) -> None:
    from transformers import DynamicCache, StaticCache

    model = glmquant.load(small_source(tmp_path / "model"), device="cpu")
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    with torch.inference_mode():
        model(torch.full((batch, 40), 5), past_key_values=cache)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    dims = Model.of_checkpoint(open_folder(tmp_path / "model")).dims
    assert cache_bytes(dims, 40 * batch, "F16") == found


@pytest.mark.parametrize(("prompt", "new"), [(40, 8), (200, 57), (20, 236), (3, 1000)])
def test_predicted_cache_is_that_of_the_loop_on_a_gpu(
    prompt: int, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded up, doubled when full, and never more than the request asks for."""
    folder = small_source(tmp_path / "model")
    model = glmquant.load(folder, device="cpu", dtype="float32")
    monkeypatch.setattr(decoding, "DEVICES", {"cpu"})
    sizes = []
    usual = DecodeStep._grow
    monkeypatch.setattr(
        DecodeStep, "_grow", lambda self, size: (sizes.append(self.capacity), usual(self, size))
    )
    options = {"max_length": None, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    model.generate(torch.full((2, prompt), 5), max_new_tokens=new, **options)
    held = replace(Model.of_checkpoint(open_folder(folder)), dtype="F32")
    load = Workload(prompt + new, 2, prompt=prompt)
    assert estimate(held, load, device="cuda").cache == decoding.cache_bytes(model)
    assert [*sizes, decoding._steps.pop(model)[0].capacity] == capacities(prompt, prompt + new)
    at_once = estimate(held, Workload(prompt + new, 2, "static", prompt=prompt), device="cuda")
    assert (estimate(held, load, device="cuda").activations > at_once.activations) == bool(sizes)


@pytest.mark.parametrize("name", HEADERS)
def test_full_size_memory(name: str) -> None:
    four, sixteen = full_size(name, Recipe()), full_size(name, Recipe(bits=16))
    load = Workload(2048)
    dims = four.dims
    heads = 32 if name.startswith("chatglm-6b") else 2
    columns = (
        2000 if four.family in ("chatglm", "glm4") else 2048
    )  # `generate` as transformers has it, or our loop
    assert estimate(four, Workload(2000)).cache == 2 * dims.layers * heads * 128 * columns * 2
    assert estimate(four, load).cache == 2 * dims.layers * heads * 128 * 2048 * 2
    assert estimate(sixteen, load).scales == estimate(sixteen, load).weights == 0
    assert 2.2 < estimate(sixteen, load).resident / estimate(four, load).resident < 3.6
    unpacked = estimate(four, load, "transformers")
    assert unpacked.resident == estimate(sixteen, load).resident
    assert "16 bit" in unpacked.note


def test_bitsandbytes_stays_packed_in_transformers() -> None:
    sixteen = estimate(full_size("chatglm3-6b", Recipe(bits=16)), Workload(2048), "transformers")
    nf4, double, int8 = (
        estimate(
            full_size("chatglm3-6b", Recipe(format="bitsandbytes", **how)), Workload(2048), "transformers"
        )  # type: ignore[arg-type]
        for how in ({}, {"double_quant": True}, {"bits": 8})
    )
    linear = 28 * (4608 * 4096 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696)
    assert (nf4.weights, nf4.scales) == (linear // 2, 4 * linear // 64)
    assert double.weights == nf4.weights
    assert linear // 64 < double.scales < 1.05 * linear // 64
    assert int8.weights == linear
    assert nf4.rest == sixteen.resident - 2 * linear
    assert nf4.workspace == 2 * 27392 * 4096  # one layer, whole
    assert "bitsandbytes keeps weights packed" in nf4.note


def test_thudms_own_figures_are_near() -> None:
    # THUDM's README of ChatGLM2-6B: 13.1 / 8.2 / 5.5 GB for FP16 / INT8 / INT4, encoding 2048 tokens.
    for recipe, stated in (
        (Recipe(bits=16), 13.1),
        (Recipe(bits=8, format="cpm"), 8.2),
        (Recipe(format="cpm"), 5.5),
    ):
        found = estimate(full_size("chatglm2-6b", recipe), Workload(2048)).allocated / 1e9
        assert stated * 0.75 < found < stated * 1.05


@pytest.mark.parametrize("runtime", ["glmquant", "transformers", "vllm", "llama.cpp"])
def test_memory_grows_with_the_context_and_the_longest_fits_exactly(runtime: str) -> None:
    model = full_size("glm-4-9b-chat", Recipe(group_size=32))
    for device in ("cpu", "cuda"):
        peaks = [estimate(model, Workload(n), runtime, device).peak for n in range(1, 131072, 4099)]  # type: ignore[arg-type]
        assert peaks == sorted(peaks)
        budget = peaks[len(peaks) // 2] + 1000
        longest = longest_context(model, Workload(1), budget, runtime, device)  # type: ignore[arg-type]
        assert estimate(model, Workload(longest), runtime, device).peak <= budget  # type: ignore[arg-type]
        assert estimate(model, Workload(longest + 1), runtime, device).peak > budget  # type: ignore[arg-type]
    assert longest_context(model, Workload(1), GIB, runtime) == 0
    assert longest_context(model, Workload(1), 10**15, runtime) == model.dims.context


def test_what_makes_no_sense_is_refused() -> None:
    model = full_size("chatglm3-6b", Recipe())
    for wrong in ({"context": 0}, {"context": -5}, {"context": 8, "batch": 0}, {"context": 8, "chunk": 0}):
        with pytest.raises(UsageError, match="makes no sense"):
            Workload(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"tgi.*not known; use glmquant"):
        estimate(model, Workload(8), "tgi")
    with pytest.raises(UsageError, match="--runtime vllm"):
        estimate(model, Workload(8), "glmquant", tp=2)


def test_an_incomplete_checkpoint_has_no_memory(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = small_source(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.output_layer.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"lacks transformer\.output_layer\.weight"):
        Model.of_checkpoint(open_folder(folder))


def test_smaller_chunks_and_static_caches() -> None:
    model = full_size("chatglm3-6b", Recipe())
    whole, pieces = (estimate(model, Workload(8192, chunk=chunk)) for chunk in (None, 512))
    assert pieces.activations < whole.activations / 2
    assert pieces.cache == whole.cache
    short = [estimate(model, Workload(8192, cache=kind, chunk=1)) for kind in ("dynamic", "static")]  # type: ignore[arg-type]
    assert short[0].activations >= short[1].activations
