"""Checkpoints that are quantized already, or that hold a P-tuning prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_sources import (
    CHATGLM,
    CHATGLM2,
    DOWN,
    GOLDEN,
    QKV,
    Tensors,
    refused,
    tiny_model,
    write_bin,
    write_model,
)
from safetensors.torch import load_file

from glmquant import (
    QuantizationError,
    QuantizedSourceError,
    Recipe,
    convert,
)

CPM = Recipe(format="cpm")
NAN = float("nan")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Models that are quantized already.


@pytest.mark.parametrize("method", ["awq", "fp8", "hqq"])
def test_a_model_quantized_by_others(method: str, tmp_path: Path, out: Path) -> None:
    folder = tiny_model(
        tmp_path, {"quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}}
    )
    refused(folder, out, f"quantized with {method},", "16-bit original", error=QuantizedSourceError)


def test_int8_weights_without_a_word_in_the_config(tmp_path: Path, out: Path) -> None:
    golden = GOLDEN / "chatglm3-6b" / "tiny-int8"
    config = json.loads((golden / "config.json").read_text())
    del config["quantization_bit"]
    folder = write_model(tmp_path / "model", config, load_file(golden / "model.safetensors"))
    refused(folder, out, "I8", "quantized")


@pytest.mark.parametrize("bits", [4, 8])
def test_half_weights_that_the_config_calls_quantized(bits: int, tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path, {"quantization_bit": bits})
    refused(folder, out, f"quantized (cpm, int{bits} row), but {QKV}", "F16", "I8")


def decoded(folder: Path) -> Tensors:
    """What THUDM's INT4 or INT8 weights stand for, in half."""
    stored = load_file(folder / "model.safetensors")
    four = json.loads((folder / "config.json").read_text())["quantization_bit"] == 4
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale"):
            continue
        if name + "_scale" in stored:
            if four:  # the even column in the high half, both in two's complement
                low = (tensor.int() << 28) >> 28
                tensor = torch.stack([tensor.int() >> 4, low], dim=-1).flatten(-2)
            tensor = (tensor.float() * stored[name + "_scale"].float().unsqueeze(1)).half()
        tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("stored", "recipe"),
    [
        ("chatglm3-6b/tiny-int8", CPM),
        ("chatglm3-6b/tiny-int8", Recipe(bits=16)),
        ("chatglm-6b/tiny-3l-int8", Recipe(quantize_embeddings=True)),
        ("chatglm-6b/tiny-3l-int4-embeddings", Recipe(bits=16)),
        ("chatglm-6b/tiny-3l-int4-embeddings", Recipe()),
    ],
)
def test_thudms_models_are_decoded_first(stored: str, recipe: Recipe, tmp_path: Path, out: Path) -> None:
    """The result is that of quantizing the weights which THUDM's codes stand for, where codes cannot be kept."""
    config = json.loads((GOLDEN / stored / "config.json").read_text())
    plain = {k: v for k, v in config.items() if not k.startswith("quantization")}
    weights = decoded(GOLDEN / stored)
    convert(GOLDEN / stored, out, recipe)
    convert(write_model(tmp_path / "plain", plain, weights), tmp_path / "expected", recipe)
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    if recipe.bits == 16 and recipe.layout != "native" and "lm_head.weight" in weights:
        written = load_file(out / "model.safetensors")
        assert all(written[name].equal(tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({DOWN + "_scale": None}, ("lacks", DOWN + "_scale")),
        ({DOWN: None}, ("lacks", DOWN)),
        ({DOWN: torch.zeros(128, 64, dtype=torch.int8)}, (DOWN, "[128, 64]", "[128, 128]")),
        ({DOWN: torch.zeros(128, 128, dtype=torch.uint8)}, (DOWN, "U8", "I8")),
        ({DOWN + "_scale": torch.ones(127).half()}, (DOWN + "_scale", "[127]", "[128]")),
    ],
    ids=["no-scale", "no-codes", "codes-of-8-bit", "unsigned", "short-scale"],
)
def test_a_damaged_model_of_thudms(
    edit: dict[str, torch.Tensor | None], words: tuple[str, ...], tmp_path: Path, out: Path
) -> None:
    convert(tiny_model(tmp_path), tmp_path / "quantized", CPM)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    tensors.update({name: tensor for name, tensor in edit.items() if tensor is not None})
    for name in [name for name, tensor in edit.items() if tensor is None]:
        del tensors[name]
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    refused(write_model(tmp_path / "damaged", config, tensors), out, *words)


def test_a_scale_that_is_no_number(tmp_path: Path, out: Path) -> None:
    convert(tiny_model(tmp_path), tmp_path / "quantized", CPM)
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    tensors[DOWN + "_scale"][3] = NAN
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    folder = write_model(tmp_path / "damaged", config, tensors)
    refused(folder, out, DOWN, "NaN", error=QuantizationError)


# P-tuning.

PREFIX = "transformer.prefix_encoder.embedding.weight"


@pytest.mark.parametrize("config", [CHATGLM, CHATGLM2], ids=["chatglm", "chatglm2"])
@pytest.mark.parametrize("bits", [None, 4], ids=["16-bit", "int4"])
def test_the_folder_that_p_tuning_leaves(
    bits: int | None, config: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    """It holds the prefix alone, and the config of the base model, which was often trained in INT4."""
    config = {**config, "pre_seq_len": 128, "prefix_projection": False, "quantization_bit": bits}
    folder = write_bin(tmp_path / "model", config, {PREFIX: torch.zeros(128, 512).half()})
    refused(folder, out, "P-tuning prefix", str(folder), "base model")


def test_a_model_with_its_prefix(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path, {"pre_seq_len": None}, **{PREFIX: torch.zeros(128, 512).half()})
    refused(folder, out, "P-tuning prefix", str(folder))


def test_a_config_without_a_prefix_may_say_so(tmp_path: Path, out: Path) -> None:
    convert(tiny_model(tmp_path, {"pre_seq_len": None, "prefix_projection": False}), out)
