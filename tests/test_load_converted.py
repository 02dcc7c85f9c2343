"""What `convert` writes loads with packed weights, and computes what the dequantized weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_formats import write_chatglm2
from helpers_models import golden, largest_difference
from safetensors.torch import load_file, save_file

import glmquant
from glmquant import Recipe
from glmquant.models.quantized import QuantizedEmbedding, QuantizedLinear

IDS = (torch.arange(24)[None] * 7 + 3) % 320

RECIPES = {
    "int4": Recipe(),
    "int4-g32": Recipe(group_size=32),
    "int4-row": Recipe(group_size="row"),
    "int4-asymmetric": Recipe(group_size=32, symmetric=False),
    "int4-row-asymmetric": Recipe(group_size="row", symmetric=False),
    "int8": Recipe(bits=8),
    "int8-head": Recipe(bits=8, group_size=64, quantize_head=True),
    "int4-ends": Recipe(group_size=32, quantize_head=True, quantize_embeddings=True),
    "int4-embeddings": Recipe(group_size=64, quantize_embeddings=True),
    "int4-shards": Recipe(group_size=64, max_shard_size=20_000),
    "int4-original": Recipe(group_size=32, layout="original"),
    "int4-original-asymmetric": Recipe(group_size=32, layout="original", symmetric=False),
    "int8-original-ends": Recipe(bits=8, layout="original", quantize_head=True, quantize_embeddings=True),
    "int4-cpm": Recipe(format="cpm"),
    "int8-cpm-mse": Recipe(bits=8, format="cpm", method="mse"),
    "16-bit": Recipe(bits=16),
    "16-bit-original": Recipe(bits=16, layout="original"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "random"
    write_chatglm2(folder, torch.bfloat16)
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def dequantize_in_place(model: Any) -> int:
    """Replace every packed layer by the ordinary one that its weight stands for; returns how many there were."""
    packed = [
        (n, m) for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))
    ]
    for name, layer in packed:
        weight = torch.nn.Parameter(layer.dequantize())
        if isinstance(layer, QuantizedEmbedding):
            plain: Any = torch.nn.Embedding(*weight.shape, _weight=weight)
        else:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight, plain.bias = weight, layer.bias
        model.set_submodule(name, plain)
    return len(packed)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_it_computes_with_the_dequantized_weights(tmp_path: Path, source: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, recipe)
    model = glmquant.load(out, device="cpu", dtype=torch.float32)
    found = logits(model)
    layers = dequantize_in_place(model)
    ends = recipe.quantize_head + recipe.quantize_embeddings
    assert layers == (0 if recipe.bits == 16 else 2 * 6 + ends)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    exact = logits(glmquant.load(source, device="cpu", dtype=torch.float32))
    assert (recipe.bits == 16) == (largest_difference(found, exact) == 0)


def test_groups_of_several_schemes(tmp_path: Path, source: Path) -> None:
    """A config.json that names schemes by layer, as a recipe with bits per layer will write it."""
    four, eight = tmp_path / "four", tmp_path / "eight"
    glmquant.convert(source, four, Recipe(group_size=32))
    glmquant.convert(source, eight, Recipe(bits=8, group_size=64))
    tensors, config = load_file(four / "model.safetensors"), json.loads((four / "config.json").read_text())
    other = load_file(eight / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    tensors.update({name: t for name, t in other.items() if name.startswith(module)})
    groups = config["quantization_config"]["config_groups"]
    special = json.loads((eight / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    groups["group_1"] = {**special, "targets": [module]}
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(tensors, mixed / "model.safetensors")
    (mixed / "config.json").write_text(json.dumps(config))
    model = glmquant.load(mixed, device="cpu", dtype=torch.float32)
    assert model.get_submodule(module).scheme.bits == 8
    assert model.quantized_bits == 4
    found = logits(model)
    dequantize_in_place(model)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embeddings", [False, True])
def test_chatglm_6b_in_packed_form(tmp_path: Path, embeddings: bool) -> None:
    source = golden("chatglm-6b/tiny-3l", "model.safetensors")
    glmquant.convert(source, tmp_path / "out", Recipe(format="cpm", quantize_embeddings=embeddings))
    model = glmquant.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    head, embedding = model.lm_head, model.transformer.word_embeddings
    if embeddings:
        assert head.weight_packed is embedding.weight_packed
        model.tie_weights()
    else:
        assert head.weight is embedding.weight
    for cast in (model.half(), model.float()):
        for name in ("weight_packed", "weight_scale") if embeddings else ("weight",):
            assert getattr(cast.lm_head, name) is getattr(cast.transformer.word_embeddings, name)
    ids = torch.tensor([[7, 8, 9, model.config.gmask_token_id, model.config.bos_token_id]])
    with torch.inference_mode():
        found = model(ids).logits
        assert dequantize_in_place(model) == 3 * 4 + 2 * embeddings
        exact = model(ids).logits
        assert largest_difference(found, exact) < 2e-5 * float(exact.abs().max())


@pytest.mark.parametrize("activations", ["exact", "as they come"])
def test_a_quantized_model_in_half_and_bfloat16(
    tmp_path: Path, source: Path, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of a prompt are rounded to 8 bit where that is faster, unless they are asked to be exact."""
    monkeypatch.setenv("GLMQUANT_EXACT", "1" if activations == "exact" else "0")
    glmquant.convert(source, tmp_path / "out", Recipe(group_size=32, quantize_embeddings=True))
    exact = logits(glmquant.load(tmp_path / "out", device="cpu", dtype=torch.float32))
    half = 0.01 if activations == "exact" else 0.03
    for dtype, limit in ((torch.float16, half), (torch.bfloat16, 0.08)):
        model = glmquant.load(tmp_path / "out", device="cpu", dtype=dtype)
        assert model.dtype == dtype
        assert model.model.embed_tokens.weight_scale.dtype == torch.bfloat16
        found = logits(model)
        assert found.dtype == dtype
        assert largest_difference(found, exact) < limit * float(exact.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_native_models_of_others(tmp_path: Path, kind: str, tied: bool) -> None:
    """GLM-4-9B-hf and GLM-4-0414, as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        tie_word_embeddings=tied, dtype=torch.float32,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    stock.save_pretrained(tmp_path / "m")
    model = glmquant.load(tmp_path / "m", device="cpu")
    assert isinstance(model, type(stock))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model), logits(stock))
    glmquant.convert(tmp_path / "m", tmp_path / "int8", Recipe(bits=8, group_size=32))
    packed = glmquant.load(tmp_path / "int8", device="cpu", dtype="float32")
    assert packed.quantized_bits == 8
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) == tied
    assert 0 < largest_difference(logits(packed), logits(stock)) < 0.1 * float(logits(stock).abs().max())
