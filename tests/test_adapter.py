"""LoRA adapters written by PEFT, merged on the way, against PEFT's own merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapter import lora, native, original_weights, skeleton, train
from helpers_sources import (
    CHATGLM,
    CHATGLM2,
    DOWN,
    EMBEDDING,
    HEAD,
    QKV,
    Tensors,
    random_tensors,
    write_bin,
    write_model,
)
from safetensors.torch import load_file
from transformers import GlmForCausalLM

from glmquant import Recipe, convert
from glmquant import _quantize as quantize_module
from glmquant._open import open_source

SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 32},
    "rslora": {"r": 8, "lora_alpha": 12, "use_rslora": True},
    "rank-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"layers\.0\.mlp\.d\w*": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {r"layers\.0\.self_att.*": 3, r"layers\.1\.mlp\.(dense_h_to_4h|gate_up_proj)": 5},
    },
    "rank-1": {"r": 1, "lora_alpha": 1},
}


def close_to(written: Tensors, merged: Tensors) -> None:
    """Equal but for a rare difference in the last place: PEFT's sums are rounded in the order of its BLAS."""
    assert set(written) == set(merged)
    differing = 0
    for name, tensor in written.items():
        expected = merged[name].to(tensor.dtype)
        last_place = (
            torch.maximum(expected.abs().float(), torch.tensor(2.0**-14)) * torch.finfo(tensor.dtype).eps
        )
        assert ((tensor.float() - expected.float()).abs() <= last_place).all(), name
        differing += int((tensor != expected).sum())
    assert differing <= 0.001 * sum(tensor.numel() for tensor in merged.values())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ChatGLM3 as THUDM published it."""
    return write_model(tmp_path_factory.mktemp("base") / "original", CHATGLM2, random_tensors(CHATGLM2))


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    """The same in the native layout."""
    out = original.with_name("converted")
    convert(original, out, Recipe(bits=16))
    return out


@pytest.fixture(params=["original", "converted"])
def base(request: pytest.FixtureRequest) -> Path:
    folder = request.getfixturevalue(request.param)
    assert isinstance(folder, Path)
    return folder


@pytest.mark.parametrize(("variant", "safe"), [(name, n % 2 == 0) for n, name in enumerate(VARIANTS)])
def test_an_adapter_for_transformers_glm(
    variant: str, safe: bool, base: Path, converted: Path, tmp_path: Path
) -> None:
    model = GlmForCausalLM.from_pretrained(converted, dtype=torch.float32)
    config = lora(target_modules=SPLIT, task_type="CAUSAL_LM", **VARIANTS[variant])
    merged = train(model, config, tmp_path / "adapter", safe=safe)
    convert(base, tmp_path / "out", Recipe(bits=16), adapter=tmp_path / "adapter")
    close_to(load_file(tmp_path / "out" / "model.safetensors"), merged)


@pytest.mark.parametrize(("variant", "safe"), [(name, n % 2 == 0) for n, name in enumerate(VARIANTS)])
def test_an_adapter_for_thudms_code(variant: str, safe: bool, base: Path, tmp_path: Path) -> None:
    config = lora(**VARIANTS[variant])
    merged = train(skeleton(original_weights()), config, tmp_path / "adapter", safe=safe)
    convert(base, tmp_path / "out", Recipe(bits=16), adapter=tmp_path / "adapter")
    close_to(load_file(tmp_path / "out" / "model.safetensors"), native(merged))


def test_an_adapter_beside_the_base_is_merged_without_being_asked(original: Path, tmp_path: Path) -> None:
    """As transformers does when such a folder is loaded."""
    train(skeleton(original_weights()), lora(), tmp_path / "adapter")
    convert(original, tmp_path / "asked", Recipe(bits=16), adapter=tmp_path / "adapter")
    both = shutil.copytree(original, tmp_path / "both")
    shutil.copytree(tmp_path / "adapter", both, dirs_exist_ok=True)
    found = convert(both, tmp_path / "out", Recipe(bits=16))
    assert found.report["source"]["adapter"] is True
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "asked" / "model.safetensors").read_bytes()


def test_the_first_chatglm(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM)
    config = lora(modules_to_save=["final_layernorm"])
    merged = train(skeleton({n: t.float() for n, t in tensors.items()}), config, tmp_path / "adapter")
    folder = write_bin(tmp_path / "model", CHATGLM, tensors)
    convert(folder, tmp_path / "out", Recipe(bits=16), adapter=tmp_path / "adapter")
    written = load_file(tmp_path / "out" / "model.safetensors")
    close_to({n: t for n, t in written.items() if not n.endswith("inv_freq")}, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bases_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    config = {**CHATGLM2, "torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = random_tensors(config, dtype)
    merged = train(skeleton({n: t.float() for n, t in tensors.items()}), lora(), tmp_path / "adapter")
    folder = write_model(tmp_path / "model", config, tensors)
    convert(folder, tmp_path / "out", Recipe(bits=16), adapter=tmp_path / "adapter")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].dtype is dtype
    for name, tensor in native(merged).items():
        torch.testing.assert_close(written[name].float(), tensor, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_quantized_base_is_decoded_before_the_merge(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "int4", Recipe(format="cpm"))
    convert(tmp_path / "int4", tmp_path / "decoded", Recipe(bits=16))
    train(skeleton(original_weights()), lora(), tmp_path / "adapter")
    for source in ("int4", "decoded"):
        convert(tmp_path / source, tmp_path / f"{source}-merged", Recipe(), adapter=tmp_path / "adapter")
    # The first is merged in float32; the second has been rounded to 16 bit once more, which moves few codes.
    merged = [(tmp_path / f"{s}-merged" / "model.safetensors").read_bytes() for s in ("int4", "decoded")]
    assert len(merged[0]) == len(merged[1])
    assert sum(map(int.__ne__, *merged)) < 0.01 * len(merged[0])
    convert(original, tmp_path / "16-bit", Recipe(), adapter=tmp_path / "adapter")
    unlike = (tmp_path / "16-bit" / "model.safetensors").read_bytes()
    assert sum(map(int.__ne__, merged[0], unlike)) > 0.1 * len(unlike)  # of the original's own weights


def same_weights(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# The same bytes, however the rows are read.

RECIPES = {
    "int4": Recipe(),
    "int8-original": Recipe(bits=8, layout="original"),
    "cpm": Recipe(format="cpm"),
    "float32": Recipe(bits=16),  # shows the last place, which rounding to half hides
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_merging_on_the_way_is_merging_first(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CHATGLM2, "torch_dtype": "float32"}
    folder = write_model(tmp_path / "model", config, random_tensors(config, torch.float32))
    train(skeleton(original_weights()), lora(modules_to_save=["output_layer"]), tmp_path / "adapter")
    convert(folder, tmp_path / "merged", Recipe(bits=16, layout="original"), adapter=tmp_path / "adapter")
    convert(tmp_path / "merged", tmp_path / "expected", recipe)
    for task_bytes, workers in ((16 << 20, 1), (3000, 2), (20_000, 3)):
        monkeypatch.setattr(quantize_module, "TASK_BYTES", task_bytes)
        out = tmp_path / f"out-{workers}"
        convert(folder, out, recipe, adapter=tmp_path / "adapter", workers=workers)
        same_weights(out, tmp_path / "expected")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_any_rows_are_those_of_the_whole(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM2, dtype)
    write = write_bin if form == "bin" else write_model
    folder = write(tmp_path / "model", CHATGLM2, tensors)
    train(skeleton(original_weights()), lora(modules_to_save=["output_layer"]), tmp_path / "adapter")
    source = open_source(folder, tmp_path / "adapter").source
    for name in (QKV, DOWN, HEAD):
        whole = source.read(name).clone()
        assert not whole.equal(tensors[name])
        for start, stop in ((0, 1), (3, 50), (90, None), (5, 5), (0, whole.shape[0])):
            assert source.read(name, start, stop).equal(whole[start:stop])
        assert source.read(name).equal(whole)  # reading has not added it to the file's own memory
    assert source.read(EMBEDDING).equal(tensors[EMBEDDING])


def test_the_report_tells_of_the_adapter(original: Path, tmp_path: Path) -> None:
    train(skeleton(original_weights()), lora(), tmp_path / "adapter")
    report = convert(original, tmp_path / "out", adapter=tmp_path / "adapter").report
    assert report["source"]["adapter"] is True
    assert set(report["source"]["files"]) == {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }


# Modules that were trained whole.


@pytest.mark.parametrize("names", ["thudm", "transformers"])
def test_modules_to_save(names: str, base: Path, tmp_path: Path) -> None:
    if names == "thudm":
        saved = ["output_layer", "final_layernorm", "layers.1.self_attention.query_key_value"]
        model, targets = skeleton(original_weights()), ["dense_h_to_4h"]
    else:
        saved = ["lm_head", "model.norm", "layers.1.self_attn.k_proj"]
        model, targets = skeleton(native(original_weights())), ["gate_up_proj"]
    merged = train(model, lora(target_modules=targets, modules_to_save=saved), tmp_path / "adapter")
    if names == "thudm":
        merged = native(merged)
    convert(base, tmp_path / "out", Recipe(bits=16), adapter=tmp_path / "adapter")
    written = load_file(tmp_path / "out" / "model.safetensors")
    close_to(written, merged)
    before = native(random_tensors(CHATGLM2))
    changed = {name for name, tensor in written.items() if not tensor.equal(before[name])}
    attention = "qkv" if names == "thudm" else "k"
    assert changed == {
        "lm_head.weight",
        "model.norm.weight",
        *(f"model.layers.{layer}.mlp.gate_up_proj.weight" for layer in (0, 1)),
        *(
            f"model.layers.1.self_attn.{part}_proj.{kind}"
            for part in attention
            for kind in ("weight", "bias")
        ),
    }
