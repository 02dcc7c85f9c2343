"""Scales that move between layers: they change nothing that a model computes, are searched by what they are for, and
what `convert` writes with them can be proven.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_calibrated import calibrated, chatglm3, output_errors, two_texts
from helpers_models import largest_difference
from helpers_sources import CHATGLM, CHATGLM2, random_tensors, refused, write_model
from safetensors.torch import load_file
from test_gptq import inputs, second_moments
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4Config, Glm4ForCausalLM

import glmquant
from glmquant import Recipe, Scheme, UsageError, families
from glmquant._folding import MOST, STEPS, Folds, effective, from_letters, scales, to_columns, to_letters
from glmquant.checkpoint.output import REPORT
from glmquant.families import Fold, Role
from glmquant.quantizers import QUANTIZERS, Scaled, WeightedLeastSquares

FAMILY = families.FAMILIES["chatglm2"]
FOLDS = list(FAMILY.folds(FAMILY.dims(CHATGLM2)))


def random_steps(fold: Fold, most: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (fold.channels,), generator=generator)


def folded(
    tensors: dict[str, Tensor], config: dict[str, Any], factor: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    family, folds = families.detect(config), Folds()
    for number, fold in enumerate(family.folds(family.dims(config))):
        steps = factor * random_steps(fold, seed=number)
        folds.add(fold, effective(fold, steps, tensors[fold.giver.name], dtype))
    return {name: folds.apply(name, tensor).contiguous() for name, tensor in tensors.items()}


def glm4(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        attention_bias=True, dtype=torch.float32,
    )  # fmt: skip
    model = Glm4ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["chatglm2", "glm4"])
@torch.no_grad()
def test_scales_change_nothing_that_a_model_computes(tmp_path: Path, kind: str) -> None:
    if kind == "glm4":
        source = glm4(tmp_path / "source")
    else:
        tensors = {name: 3 * tensor for name, tensor in random_tensors(CHATGLM2, torch.float32).items()}
        source = write_model(tmp_path / "source", {**CHATGLM2, "torch_dtype": "float32"}, tensors)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    moved = folded(tensors, config, 1, torch.float16)
    # All of norms and linear weights are touched, ...
    family = families.detect(config)
    for spec in family.tensors(family.dims(config)):
        inside = spec.layer is not None and "post_self" not in spec.name and "post_mlp" not in spec.name
        fixed = spec.role is Role.BIAS and "v_proj" not in spec.name and kind == "glm4"
        fixed |= "self_attn.q_proj.bias" in spec.name
        assert torch.equal(moved[spec.name], tensors[spec.name]) == (not inside or fixed)
    # ... and norms are as they are stored.
    norm = next(name for name in moved if "post_attention_layernorm" in name)
    changed = moved[norm] != tensors[norm]
    torch.testing.assert_close(
        moved[norm], moved[norm].where(~changed, moved[norm].half()), rtol=1e-6, atol=0
    )
    write_model(tmp_path / "moved", config, moved)
    ids = torch.arange(3, 60)[None]
    if kind == "glm4":  # as transformers computes it, without this package
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("source", "moved")
        )
    else:
        before, after = (
            glmquant.load(tmp_path / name, "cpu", torch.float32)(ids).logits for name in ("source", "moved")
        )
    assert largest_difference(before, after) < 2e-5 * float(before.abs().max())
    assert float(before.std()) > 0.1


def test_scales_are_undone_exactly() -> None:
    """Powers of two, back and forth, give every bit back."""
    tensors = random_tensors(CHATGLM2, torch.float32)
    there = folded(tensors, CHATGLM2, STEPS, torch.float32)
    back = folded(there, CHATGLM2, -STEPS, torch.float32)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert not torch.equal(there[FOLDS[0].giver.name], tensors[FOLDS[0].giver.name])


def test_rows_are_scaled_alike_however_they_are_read() -> None:
    tensors = random_tensors(CHATGLM2)
    folds = Folds()
    for fold in FOLDS:
        folds.add(fold, effective(fold, random_steps(fold), tensors[fold.giver.name], torch.float16))
    for name, tensor in tensors.items():
        whole = folds.apply(name, tensor)
        pieces = [folds.apply(name, tensor[i : i + 50], i) for i in range(0, len(tensor), 50)]
        assert torch.equal(torch.cat([piece.float() for piece in pieces]), whole.float())
        assert (whole.dtype is torch.float32) == (name in folds)


def test_letters() -> None:
    steps = torch.arange(-MOST, MOST + 1)
    assert torch.equal(from_letters(to_letters(steps)), steps)
    assert torch.equal(scales(steps[:: 2 * STEPS][:-1] + MOST % STEPS).log2() % 1, torch.zeros(7))
    with pytest.raises(ValueError, match="substring not found"):
        from_letters("!")


@pytest.mark.parametrize("fold", FOLDS[:4], ids=lambda fold: fold.takers[0].name.split(".")[-2])
def test_the_exponent_has_the_least_output_error_and_pays_on_inputs_not_seen(fold: Fold) -> None:
    solver, scheme, exponents = WeightedLeastSquares(), Scheme(4, 32), (0.2, 0.4, 0.6)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(64, taker.shape[1], generator=generator) for taker in fold.takers]
    columns = fold.channels * fold.repeat
    x, unseen = inputs(columns), inputs(columns, seed=1)
    shared = (fold.channels // fold.block, fold.repeat, fold.block)
    sizes = x.square().mean(0).view(shared).mean(1).flatten().sqrt()

    def error(steps: Tensor, x: Tensor) -> float:
        scale, total = to_columns(fold, scales(steps)), 0.0
        moments = second_moments(x / scale)
        for weight in weights:
            found = solver(weight * scale, scheme, moments).dequantize()
            total += float((x @ weight.t() - (x / scale) @ found.t()).square().sum())
        return total

    tried = {0.0: torch.zeros(fold.channels)}
    for exponent in exponents:
        log = STEPS * exponent * (sizes / sizes.log().mean().exp()).log2()
        tried[exponent] = log.round().clamp(-MOST, MOST)
    best = min(tried, key=lambda exponent: error(tried[exponent], x))
    found = Scaled(solver, exponents).steps(fold, weights, [scheme] * len(weights), second_moments(x))
    assert best > 0
    assert float((found - tried[best]).abs().max()) <= 1  # a channel on the edge between two steps
    assert float((found != tried[best]).float().mean()) < 0.02
    assert error(found, unseen) < error(tried[0.0], unseen)


def test_inputs_alike_are_left_alone_and_the_bytes_are_the_same() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    awq = QUANTIZERS["awq"]
    assert isinstance(awq, Scaled)
    for moments in (torch.eye(128), torch.zeros(128, 128)):
        assert not awq.steps(FOLDS[0], [weight], [Scheme(4, 32)], moments).any()
    moments = second_moments(inputs(128))
    runs = [awq.steps(FOLDS[0], [weight], [Scheme(4, 32)], moments) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatglm3(tmp_path_factory.mktemp("source") / "model", outliers=8)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"group_size": 32}),
        ("awq-gptq", {"format": "gptq", "layout": "original", "group_size": 32}),
        ("awq", {"format": "cpm"}),
    ],
    ids=["compressed-tensors", "gptq-original", "cpm"],
)
def test_what_is_written_can_be_proven(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    report = glmquant.convert(source, out, calibrated(method, texts[0], **options), device="cpu").report
    letters = report["calibration"]["folded"]
    assert [len(found) for found in letters] == [128, 128, 128, 256] * 2
    assert sum(set(found) != set(to_letters(torch.tensor([0]))) for found in letters) >= 6
    prefix = "model.layers.1." if (out / "tokenizer.json").exists() else "transformer.encoder.layers.1."
    stored = load_file(out / "model.safetensors")[f"{prefix}input_layernorm.weight"]
    gain = load_file(source / "model.safetensors")["transformer.encoder.layers.1.input_layernorm.weight"]
    assert torch.equal(stored, (gain.float() / scales(from_letters(letters[4]))).half())
    assert glmquant.verify(out).ok
    proven = glmquant.verify(out, source=source)
    assert proven.ok
    assert len(proven.errors) >= 8
    if "format" not in options:
        glmquant.convert(source, tmp_path / "native", Recipe(bits=16))
        assert glmquant.verify(out, source=tmp_path / "native").ok
        plain = tmp_path / "plain"
        glmquant.convert(source, plain, calibrated("weighted-mse", texts[0], **options), device="cpu")
        before, after = (output_errors(folder, source, texts[1]) for folder in (plain, out))
        assert sum(after) < 0.9 * sum(before)
        assert all(scaled < 1.05 * unscaled for scaled, unscaled in zip(after, before, strict=True))
        other = next(letter for letter in "ABCD" if letter != letters[0][0])
        for changed, said in ((other + letters[0][1:], "input_layernorm"), ("!" + letters[0][1:], "damaged")):
            report["calibration"]["folded"] = [changed, *letters[1:]]
            (out / REPORT).write_text(json.dumps(report))
            assert any(said in problem for problem in glmquant.verify(out, source=source).problems)


def test_chatglm_6b_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", CHATGLM, random_tensors(CHATGLM))
    recipe = Recipe(method="awq", format="cpm")
    refused(source, tmp_path / "out", "residual stream", "--method gptq", error=UsageError, recipe=recipe)
