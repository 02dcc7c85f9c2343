"""`glmquant.measure`: what the damage is, that it is kept, and what it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_convert import config, content, small_source, tensors, write_source
from helpers_sources import CHATGLM2, random_tensors, write_model
from hub import HubServer
from test_original_tokenizers_tiny import sentencepiece_folder

import glmquant
from glmquant import Fit, Measurement, Recipe, SourceError, UsageError, cli, convert, measure
from glmquant._recipes import possible_recipes
from glmquant._sensitivity import Kind, kinds
from glmquant.checkpoint.output import REPORT
from glmquant.checkpoint.source import open_folder
from glmquant.memory import Workload
from glmquant.recipe import Calibration


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements are kept; compiled kernels stay where they are."""
    folder = tmp_path_factory.getbasetemp() / "measured"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr("glmquant._sensitivity.cache_folder", lambda kind: folder)
    return folder


def test_damage_is_the_relative_output_error(tmp_path: Path) -> None:
    made = config(layers=1)
    weights = tensors(made)
    norm = "transformer.encoder.layers.0.input_layernorm.weight"
    weights[norm] = torch.linspace(0.1, 3, 128).half()
    source = write_source(tmp_path / "model", weights, made)
    unit = measure(source, "rtn").units[0]
    weight = weights["transformer.encoder.layers.0.self_attention.query_key_value.weight"].double()
    scale = (weight.view(-1, 4, 32).abs().amax(-1, keepdim=True) / 7).half().double()
    rounded = ((weight.view(-1, 4, 32) / scale).round().clamp(-8, 7) * scale).view_as(weight)
    x = torch.randn(20000, 128, dtype=torch.float64) * weights[norm].double()
    expected = (x @ (weight - rounded).t()).square().sum() / (x @ weight.t()).square().sum()
    assert unit.damage[Kind(4, 32)] == pytest.approx(float(expected), rel=0.03)
    ordered = [Kind(8, 32), Kind(8, 128), Kind(4, 32), Kind(4, 64), Kind(4, "row")]
    assert [unit.damage[kind] for kind in ordered] == sorted(unit.damage[kind] for kind in ordered)


def test_a_measurement_is_kept_until_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_source(tmp_path / "model")
    first = measure(source)
    monkeypatch.setattr("glmquant._sensitivity._measured", lambda *args: pytest.fail("measured again"))
    assert measure(source) == first
    (source / "model.safetensors").touch()
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measure(source)


def test_a_damaged_measurement_is_made_again(tmp_path: Path, kept: Path) -> None:
    source = small_source(tmp_path / "model")
    first = measure(source)
    for path in kept.iterdir():
        path.write_text('{"units": [3')
    assert measure(source) == first


@pytest.mark.parametrize("kind", [k for k in kinds("mse") if not k.symmetric], ids=str)
def test_zero_points_help_where_weights_are_lopsided(kind: Kind, tmp_path: Path) -> None:
    made = config(layers=1)
    weights = {name: t.abs() if t.ndim == 2 else t for name, t in tensors(made).items()}
    found = measure(write_source(tmp_path / "model", weights, made))
    lopsided, symmetric = found.relative_error(kind), found.relative_error(Kind(kind.bits, kind.group))
    assert lopsided is not None
    assert symmetric is not None
    assert lopsided < 0.7 * symmetric


def test_the_errors_are_those_of_converted_weights(tmp_path: Path) -> None:
    """With norms of ones, the damage is the squared relative error of a weight, which ``convert`` reports."""
    made = config(layers=1)
    weights = tensors(made)
    for name in weights:
        if name.endswith("layernorm.weight"):
            weights[name] = torch.ones_like(weights[name])
    source = write_source(tmp_path / "model", weights, made)
    seen = set()
    for number, recipe in enumerate(possible_recipes(open_folder(source))):
        if recipe.bits == 16 or recipe.activations:
            continue
        result = convert(source, tmp_path / str(number), recipe)
        scheme = next(item.scheme for item in result.plan.items if item.scheme)
        name = next(
            n for n in result.report["tensors"] if n.endswith(("dense_4h_to_h.weight", "down_proj.weight"))
        )
        found = result.report["tensors"][name]["relative_error"]
        units = {unit.name: unit.damage for unit in measure(source, str(recipe.method)).units}
        damage = units["layer 0 dense_4h_to_h"][Kind.of(scheme)]
        assert damage**0.5 == pytest.approx(found, rel=1e-3), recipe
        seen.add(Kind.of(scheme).grid)
    assert seen == {"int", "nf4", "llm.int8", "minimum"}


def test_every_recipe_has_an_error_once_it_was_measured(tmp_path: Path) -> None:
    source = small_source(tmp_path / "model")
    assert {row.error for row in glmquant.recipes(source, Workload(64))} == {0, None}
    rows = glmquant.recipes(source, Workload(64), measure=True)
    assert {row.recipe.activations for row in rows if row.error is None} == {8}
    assert rows == glmquant.recipes(source, Workload(64))
    by_name = {row.name: row.error for row in rows}
    assert by_name["compressed-tensors int4 g32"] < by_name["compressed-tensors int4 row"]
    assert by_name["gguf int4 g32 min"] < by_name["gguf int4 g32"]
    assert (
        by_name["compressed-tensors int4 row"] < by_name["cpm int4 row"]
    )  # mse, and rounding to the nearest


def test_a_saved_measurement_serves_another_machine(tmp_path: Path, kept: Path) -> None:
    source = small_source(tmp_path / "model")
    file = tmp_path / "measured.json"
    run = CliRunner().invoke
    done = run(cli.main, ["recipes", str(source), "--context", "64", "--measure", "--save", str(file)])
    assert done.exit_code == 0, done.output
    assert Measurement.load(file) == measure(source)
    for path in kept.iterdir():
        path.unlink()
    options = ["--fit", "600MiB", "--context", "64", "--dry-run", "--measurement", str(file)]
    planned = run(cli.main, ["convert", str(source), str(tmp_path / "out"), *options])
    assert planned.exit_code == 0, planned.output
    assert not list(kept.iterdir())  # nothing was measured


def test_a_calibrated_measurement_is_saved_too(tmp_path: Path, kept: Path) -> None:
    source = sentencepiece_folder(tmp_path / "model", "chatglm3-6b")
    made = {**CHATGLM2, "padded_vocab_size": 512}
    write_model(source, made, random_tensors(made))
    file = tmp_path / "measured.json"
    run = CliRunner().invoke
    asked = ["--method", "weighted-mse", "--calibration", "random", "--calibration-windows", "2"]
    options = ["recipes", str(source), "--context", "64", *asked, "--measure", "--save", str(file), "--json"]
    done = run(cli.main, options)
    assert done.exit_code == 0, done.output
    found = Measurement.load(file)
    calibration = Calibration("random", 2)
    assert found == measure(source, "weighted-mse", calibration=calibration)
    kind = Kind(4, 128)
    assert found.relative_error(kind) != measure(source).relative_error(kind)
    rows = {row["name"]: row for row in json.loads(done.stdout)["recipes"]}
    assert rows["compressed-tensors int4 g128"]["relative_output_error"] == found.relative_error(kind)
    assert rows["compressed-tensors int4 g128"]["recipe"]["method"] == "weighted-mse"
    assert rows["bitsandbytes nf4 g64"]["recipe"]["method"] == "bitsandbytes"  # which has no such method
    for path in kept.iterdir():
        path.unlink()
    fit = ["--fit", "600MiB", "--context", "64", "--dry-run", "--measurement", str(file), *asked]
    planned = run(cli.main, ["convert", str(source), str(tmp_path / "out"), *fit])
    assert planned.exit_code == 0, planned.output
    assert not list(kept.iterdir())


def test_a_calibration_without_a_calibrated_method_is_refused(tmp_path: Path) -> None:
    source = str(small_source(tmp_path / "model"))
    options = ["recipes", source, "--context", "64", "--measure", "--calibration", "random"]
    for more in ([], ["--method", "mse"]):
        done = CliRunner().invoke(cli.main, [*options, *more])
        assert (done.exit_code, done.stdout) == (2, "")
        assert (
            "--calibration is for --method gptq, weighted-mse, awq, awq-gptq; give one of them" in done.stderr
        )
    done = CliRunner().invoke(cli.main, ["recipes", source, "--context", "64", "--method", "hqq"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda found: None, SourceError, "cannot be read"),
        (lambda found: "[1, 2]", SourceError, "is no measurement; .* --save FILE"),
        (lambda found: {**found, "units": found["units"][1:]}, UsageError, "a model with other layers"),
        (lambda found: {**found, "method": "rtn"}, UsageError, "with --method rtn and the recipe uses mse"),
    ],
)
def test_a_measurement_of_something_else_is_refused(
    spoil: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    source = small_source(tmp_path / "model")
    file = tmp_path / "measured.json"
    spoiled = spoil(measure(source).to_json())
    if spoiled is not None:
        file.write_text(json.dumps(spoiled))
    with pytest.raises(error, match=said):
        glmquant.plan_conversion(source, Recipe(fit=Fit(2**30, 64)), measurement=file)


def test_fitting_a_model_on_a_hub(server: HubServer, tmp_path: Path) -> None:
    local = small_source(tmp_path / "local", shards=3, layers=4, hidden=512, ffn=1024, vocab=1024)
    server.add("org/model").commit_folder(local)
    whole = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    peaks = [row.memory.peak for row in glmquant.recipes(local, Workload(64)) if row.memory]
    recipe, out = Recipe(fit=Fit((peaks[0] + peaks[-1]) // 2, 64)), tmp_path / "out"
    with pytest.raises(
        UsageError, match=r"fetch this model twice; add --keep-source, or .*--measurement FILE"
    ):
        convert("hf:org/model", out, recipe)
    assert not out.exists()
    assert server.file_bytes("model-0") < whole / 4  # headers
    measured = replace(measure(local), method="mse")
    convert("hf:org/model", out, recipe, measurement=measured)
    assert server.file_bytes("model-0") < 1.3 * whole
    kept = convert("hf:org/model", tmp_path / "kept", recipe, keep_source=True)
    assert kept.plan.recipe.fit is not None
    assert len({choice.bits for choice in kept.plan.recipe.fit.choices}) > 1
    assert server.file_bytes("model-0") < 2.5 * whole  # measured and converted from one download
    first, second = content(out), content(tmp_path / "kept")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name != REPORT)
    convert("hf:org/model", tmp_path / "again", recipe)  # nothing is missing any more, and it was measured
