"""``convert --fit``: what is measured, what is chosen, and that it holds."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers_convert import small_source, stored_tensors
from helpers_sources import CHATGLM, random_tensors, write_model

import glmquant
from glmquant import DoesNotFitError, Fit, Recipe, cli, convert, measure, verify
from glmquant._fit import Option, _with, fitted, spend
from glmquant._open import open_source
from glmquant._sensitivity import Kind
from glmquant.checkpoint.output import REPORT
from glmquant.checkpoint.source import open_folder
from glmquant.families.chatglm2 import FAMILY
from glmquant.memory import Model, Workload, estimate
from glmquant.plan import resolve_recipe
from glmquant.recipe import Calibration, Choice

MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model", layers=3)


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements are kept; compiled kernels stay where they are."""
    folder = tmp_path_factory.getbasetemp() / "measured"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr("glmquant._sensitivity.cache_folder", lambda kind: folder)
    return folder


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def peak_of(source: Path, recipe: Recipe) -> int:
    plan = glmquant.plan_conversion(source, recipe)
    return estimate(Model.of_plan(plan, "F16"), Workload(64)).peak


def middle(source: Path) -> int:
    """A budget between INT4 and 16 bit."""
    return (peak_of(source, Recipe(group_size=128)) + peak_of(source, Recipe(bits=16))) // 2


def test_the_knapsack_is_within_one_step_of_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        options = []
        for _ in range(4):
            sizes = sorted(torch.randint(1, 60, (4,), generator=generator).tolist())
            damages = sorted(torch.rand(4, generator=generator).tolist(), reverse=True)
            options.append(
                [Option((4, n), b, d) for n, (b, d) in enumerate(zip(sizes, damages, strict=True))]
            )
        least = sum(o[0].nbytes for o in options)
        spare = 50
        taken, refused = spend(options, spare)
        assert sum(step.nbytes for step in taken) <= spare
        found = sum(o[0].damage for o in options) - sum(step.gain for step in taken)
        every = itertools.product(*options)
        best = min(sum(o.damage for o in c) for c in every if sum(o.nbytes for o in c) <= least + spare)
        slack = max((step.gain for step in refused), default=0.0)
        assert best - 1e-12 <= found <= best + slack + 1e-12


def test_the_choice_stays_within_the_budget_and_improves_with_it(source: Path) -> None:
    opened = open_source(source)
    damage = []
    for budget in range(peak_of(source, Recipe(group_size="row")), peak_of(source, Recipe(bits=16)), 60_000):
        recipe = fitted(opened, Recipe(fit=Fit(budget, 64)))
        assert recipe.fit is not None
        assert peak_of(source, recipe) == recipe.fit.predicted <= budget
        units = {unit.tensors: unit for unit in measure(source).units}
        damage.append(
            sum(
                0.0 if c.bits == 16 else units[c.tensors].damage[Kind(c.bits, c.group_size)]
                for c in recipe.fit.choices
            )  # type: ignore[index]
        )
    assert damage == sorted(damage, reverse=True)
    assert damage[-1] < damage[0] / 10


def test_mixed_bits_convert_load_verify_and_check(source: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"
    result = run("convert", source, out, "--fit", f"{middle(source)}", "--context", "64")
    assert result.exit_code == 0, result.output
    assert "fits" in result.stdout
    report = json.loads((out / REPORT).read_text())
    choices = report["recipe"]["fit"]["choices"]
    schemes = {(c["bits"], c["group_size"]) for c in choices}
    assert len(schemes) > 1
    for choice in choices:  # what it was chosen for, and what it would have taken to be better
        smallest = choice["bits"] == min(bits for bits, _ in schemes)
        assert re.search(r"removes [\d.e-]+ % of the damage for [\d.]+ MiB", choice["reason"]) or smallest
        assert choice["bits"] == 16 or "the budget " in choice["reason"]
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        assert len({str(report["tensors"][f"{prefix}{p}_proj.weight"]["scheme"]) for p in "qkv"}) == 1
    assert verify(out, source).ok
    model = glmquant.load(out, device="cpu", dtype="float32")
    reference = glmquant.load(source, device="cpu", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        # Dequantized weights in plain layers give the same logits.
        from glmquant.models.quantized import QuantizedLinear

        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                reference.get_submodule(name).weight.copy_(layer.dequantize())
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
    checked = run("check", out)
    assert checked.exit_code == 0, checked.output
    assert run("check", out, "--vram", report["recipe"]["fit"]["predicted"] - 1).exit_code == 1


def test_mixed_bits_are_valid_compressed_tensors(source: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import GlmForCausalLM

    budget = (
        peak_of(source, Recipe(group_size=128)) + peak_of(source, Recipe(bits=8, group_size="row"))
    ) // 2
    out = convert(source, tmp_path / "out", Recipe(fit=Fit(budget, 64))).out
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(QuantizationConfig.model_validate(section).config_groups) > 1
    stock = GlmForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = glmquant.load(out, device="cpu", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(stock(ids).logits, ours(ids).logits, atol=1e-3)


def test_layers_may_stay_in_16_bit(source: Path, tmp_path: Path) -> None:
    budget = peak_of(source, Recipe(bits=16)) - 20_000
    out = convert(source, tmp_path / "out", Recipe(fit=Fit(budget, 64))).out
    stored = stored_tensors(out)
    plain = [n for n, t in stored.items() if n.endswith("_proj.weight") and t.dtype == torch.float16]
    packed = [n for n in stored if n.endswith("weight_packed")]
    assert plain
    assert packed
    assert {n.removesuffix(".weight") for n in plain} <= set(
        json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    )
    glmquant.load(out, device="cpu")
    roomy = convert(source, tmp_path / "roomy", Recipe(fit=Fit(2**40, 64)))
    assert (roomy.plan.recipe.bits, roomy.plan.recipe.format) == (16, "safetensors")
    assert Model.of_checkpoint(open_folder(roomy.out)).weights > 0


def test_all_in_16_bit_needs_no_calibration() -> None:
    whole = Fit(1 << 30, 64, choices=(Choice("layer 0", (), 16, None),))
    recipe = Recipe(method="gptq", calibration=Calibration(), fit=replace(whole, choices=()))
    made = _with(recipe, whole)
    assert (made.bits, made.method, made.calibration) == (16, None, None)
    resolve_recipe(made, FAMILY)


def test_options_that_16_bit_has_no_use_for_are_told(source: Path, tmp_path: Path, run: Any) -> None:
    options = ["--fit", "1000GiB", "--context", "64"]
    ends = ["--quantize-head", "--quantize-embeddings", "--format", "compressed-tensors"]
    for command in (["--dry-run"], []):
        result = run("convert", source, tmp_path / "out", *options, *ends, *command)
        assert result.exit_code == 0, result.output
        assert "note: everything fits in 16 bit, so nothing is quantized; not used: --format compressed-tensors, " \
            "--quantize-head, --quantize-embeddings." in result.stdout  # fmt: skip
    assert "note: everything" not in run("convert", source, tmp_path / "plain", *options).stdout


def test_a_budget_below_the_smallest(source: Path, tmp_path: Path, run: Any) -> None:
    """No context makes it fit, and a shorter one takes less all the same."""
    words = r"at the smallest, and the budget is 100\.00 MiB; raise the budget, or "
    shorter = r"lower --context as well \(with 1 token it takes [0-9.]+ GiB\), or add --quantize-head"
    with pytest.raises(DoesNotFitError, match=words + shorter):
        convert(source, tmp_path / "out", Recipe(fit=Fit(100 * MIB, 256)))
    with pytest.raises(DoesNotFitError, match=f"{words}add --quantize-head"):
        convert(source, tmp_path / "out", Recipe(fit=Fit(100 * MIB, 1)))
    result = run("convert", source, tmp_path / "out", "--fit", "100MiB", "--context", "256")
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fit", "0GiB"], "must be positive"),
        (["--fit", "-1GiB"], "not a size"),
        (["--fit", "6GiB", "--bits", "4"], "leave out --bits"),
        (["--fit", "6GiB", "--group-size", "32"], "leave out --group-size"),
        (["--fit", "6GiB", "--asymmetric"], "--asymmetric"),
        (["--fit", "6GiB", "--format", "cpm"], "--format compressed-tensors"),
        (["--fit", "6GiB", "--context", "100000"], "beyond the 256 tokens"),
        (["--context", "100"], "--fit"),
    ],
)
def test_options_that_contradict(
    source: Path, tmp_path: Path, run: Any, options: list[str], said: str
) -> None:
    result = run(
        "convert",
        source,
        tmp_path / "out",
        *options,
        *([] if "--context" in options else ["--context", "64"]),
    )
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_chatglm_6b_has_one_scheme_for_all_layers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", CHATGLM, random_tensors(CHATGLM))
    with pytest.raises(glmquant.UsageError, match="not for ChatGLM-6B"):
        convert(source, tmp_path / "out", Recipe(fit=Fit(2**40, 64)))
