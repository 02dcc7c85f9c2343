"""`glmquant.load` against what THUDM's code computed: every golden model, 16-bit and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import (
    FIRST,
    FIRST_QUANTIZED,
    LATER,
    LATER_QUANTIZED,
    expected,
    generated,
    golden,
    greedy,
    largest_difference,
)
from safetensors.torch import load_file
from torch import Tensor

import glmquant
from glmquant import Recipe
from glmquant.models.quantized import QuantizedLinear

# THUDM's float32 logits are within 2e-4 (ChatGLM-6B) and 3e-5 (the others) of float64.
FIRST_LIMIT, LATER_LIMIT = 1e-3, 1e-4
FAR = ("far_positions", "gappy_positions")


@torch.inference_mode()
def logits(model: Any, ids: Tensor, **options: Tensor) -> Tensor:
    found: Tensor = model(ids, **options).logits
    return found


@pytest.mark.parametrize("name", LATER)
def test_later_generations_compute_the_golden_logits(name: str) -> None:
    folder, truth = expected(name)
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    assert not model.training
    ids = truth["single.input_ids"]
    assert largest_difference(logits(model, ids), truth["single.logits"]) <= LATER_LIMIT
    for case in FAR:
        if f"{case}.logits" in truth:
            found = logits(model, ids, position_ids=truth[f"{case}.position_ids"])
            assert largest_difference(found, truth[f"{case}.logits"]) <= LATER_LIMIT, case
    mask = truth["batch.attention_mask"]
    found = logits(
        model, truth["batch.input_ids"], attention_mask=mask, position_ids=truth["batch.position_ids"]
    )
    assert largest_difference(found, truth["batch.logits"], mask) <= LATER_LIMIT


@pytest.mark.parametrize("name", LATER)
def test_a_second_chunk_goes_on_from_the_cache(name: str) -> None:
    folder, truth = expected(name)
    if "continuation.first_logits" not in truth:
        pytest.skip("no such case among the golden data of this model")
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    ids, first = truth["single.input_ids"], truth["continuation.first_logits"]
    with torch.inference_mode():
        one = model(ids[:, : first.shape[1]], use_cache=True)
        two = model(ids[:, first.shape[1] :], past_key_values=one.past_key_values)
    assert largest_difference(one.logits, first) <= LATER_LIMIT
    assert largest_difference(two.logits, truth["continuation.second_logits"]) <= LATER_LIMIT


@pytest.mark.parametrize("name", LATER)
def test_greedy_generation_is_the_golden_one(name: str) -> None:
    folder, truth = expected(name)
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    for run, facts in generated(name, truth).items():
        ids = torch.tensor(facts["input_ids"])
        case = run.partition("_with")[0]
        mask = truth.get(f"{case}.attention_mask", torch.ones_like(ids))
        # null: never stop; transformers reads None as "the model's default"
        stops = facts["eos_token_id"] or [model.config.vocab_size]
        found = greedy(model, ids, attention_mask=mask, eos_token_id=stops)
        assert found[:, ids.shape[1] :].tolist() == facts["generated_ids"], run


@pytest.mark.parametrize("name", LATER_QUANTIZED)
@pytest.mark.parametrize("shape", ["safetensors", "bin"])
def test_quantized_later_generations(name: str, shape: str, tmp_path: Path) -> None:
    folder, truth = expected(name)
    if shape == "bin":
        folder = only_bin(golden(name, "pytorch_model.bin"), tmp_path)
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 3 * 6
    assert largest_difference(logits(model, truth["single.input_ids"]), truth["single.logits"]) <= LATER_LIMIT


def only_bin(folder: Path, tmp_path: Path) -> Path:
    for file in ("config.json", "pytorch_model.bin"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", [*FIRST, *FIRST_QUANTIZED])
def test_the_first_generation(name: str) -> None:
    folder, truth = expected(name)
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    cases = [key.removesuffix(".logits") for key in truth if key.endswith(".logits")]
    assert len(cases) >= 3
    for case in cases:
        found = logits(model, truth[f"{case}.input_ids"], **extras(truth, case))
        real = (truth[f"{case}.input_ids"] != model.config.pad_token_id).cumsum(
            -1
        ) > 0  # padding is on the left
        assert largest_difference(found, truth[f"{case}.logits"], real) <= FIRST_LIMIT, case


def extras(truth: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    """Mask and positions where a golden case gives them; else the model makes its own."""
    names = {"attention_mask": f"{case}.attention_mask", "position_ids": f"{case}.position_ids"}
    return {name: truth[key] for name, key in names.items() if key in truth}


SHARDED = {
    "chatglm-6b/tiny-3l/bin-fp16": "chatglm-6b/tiny-3l",
    "chatglm2-6b/tiny/bin-fp16": "chatglm2-6b/tiny",
    "chatglm3-6b/tiny/bin-fp16": "chatglm3-6b/tiny",
    "glm-4-9b-chat/tiny/safetensors-bf16": "glm-4-9b-chat/tiny",
}


@pytest.mark.parametrize("shards", SHARDED)
def test_shards_hold_the_same_model(shards: str) -> None:
    folder, truth = expected(SHARDED[shards])
    model = glmquant.load(golden(shards), device="cpu", dtype="float32")
    case = "prompt" if "prompt.logits" in truth else "single"
    found = logits(model, truth[f"{case}.input_ids"], **extras(truth, case))
    assert largest_difference(found, truth[f"{case}.logits"]) <= FIRST_LIMIT / 2
    whole = glmquant.load(folder, device="cpu", dtype="float32")  # where it is at hand, else the shards again
    assert torch.equal(found, logits(whole, truth[f"{case}.input_ids"], **extras(truth, case)))


def test_the_dtype_is_the_stated_one_unless_asked_for() -> None:
    half, brain = golden("chatglm3-6b/tiny/bin-fp16"), golden("glm-4-9b-chat/tiny/safetensors-bf16")
    assert glmquant.load(half, device="cpu").dtype == torch.float16
    assert glmquant.load(brain, device="cpu").dtype == torch.bfloat16
    assert glmquant.load(brain, device="cpu", dtype="auto").lm_head.weight.dtype == torch.bfloat16
    assert glmquant.load(half, device="cpu", dtype="torch.bfloat16").config.dtype == torch.bfloat16


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_keeps_rotary_frequencies_and_scales_exact(cast: str) -> None:
    """`.half()` as on THUDM's model cards must not turn far positions by the wrong angle."""
    folder = golden("chatglm3-6b/tiny-int4", "model.safetensors")
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    before = (model.model.rotary_emb.inv_freq.clone(), layer.dequantize())
    assert getattr(model, cast)() is model
    assert model.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}[cast]
    assert layer.weight_packed.dtype == torch.int32
    assert layer.bias.dtype == model.dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, before[0])
    assert torch.equal(layer.dequantize(), before[1])
    ids = torch.arange(5, 20)[None]
    assert logits(model, ids).dtype == model.dtype
    logits(model.to("cpu", torch.float32), ids)


def test_generation_defaults_of_the_folder_are_used(tmp_path: Path) -> None:
    source = golden("glm-4-9b-chat/tiny/safetensors-bf16")
    glmquant.convert(source, tmp_path / "out", Recipe(bits=16))
    config = glmquant.load(tmp_path / "out", device="cpu").generation_config
    assert (config.do_sample, config.top_p, config.temperature) == (True, 0.8, 0.8)
    assert isinstance(config.eos_token_id, list)
    bare = glmquant.load(golden("chatglm3-6b/tiny/bin-fp16"), device="cpu").generation_config
    assert (bare.do_sample, bare.eos_token_id, bare.pad_token_id) == (None, 2, 0)


def test_what_save_pretrained_writes_loads_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, truth = expected("chatglm3-6b/tiny")
    model = glmquant.load(folder, device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(stock).__module__ == "transformers.models.glm.modeling_glm"
    assert stock.config.architectures == ["GlmForCausalLM"]
    ids = truth["single.input_ids"]
    assert torch.equal(logits(stock, ids), logits(model, ids))
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
