"""Converting what is quantized already: codes are kept where the grid of the target holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_formats import GOLDEN, load_json, load_tensors, random_weight, write_chatglm2
from test_native_load import dequantized

import glmquant
from glmquant import Recipe, Scheme
from glmquant.checkpoint.source import open_folder
from glmquant.plan import make_plan
from glmquant.quantizers import QUANTIZERS

CT, CPM = "compressed-tensors", "cpm"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_chatglm2(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Weights and configuration."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name == "config.json"
    }


def entries(folder: Path) -> dict[str, Any]:
    tensors = load_json(folder / "quantization_report.json")["tensors"]
    return {name: entry for name, entry in tensors.items() if entry["scheme"]}


SAME = [
    (Recipe(group_size=64), Recipe(group_size=64, format="gptq")),
    (Recipe(group_size=64), Recipe(group_size=64, format="gptq", gptq_version=2)),
    (Recipe(bits=8, group_size="row"), Recipe(bits=8, group_size="row", format="gptq")),
    (Recipe(group_size="row", layout="original"), Recipe(format=CPM, method="mse")),
    (Recipe(bits=8, group_size="row", layout="original"), Recipe(bits=8, format=CPM, method="mse")),
    (Recipe(bits=8, group_size="row"), Recipe(bits=8, activations=8)),
]


def _id(recipe: Recipe) -> str:
    return (
        f"{recipe.format or CT}{recipe.bits}{recipe.gptq_version or ''}{'a8' if recipe.activations else ''}"
    )


@pytest.mark.parametrize(("first", "second"), SAME, ids=lambda r: _id(r))
def test_there_and_back_is_byte_for_byte(source: Path, tmp_path: Path, first: Recipe, second: Recipe) -> None:
    """One format, made directly or from the other, in both directions."""
    for start, end in ((first, second), (second, first)):
        a, b, direct = (tmp_path / f"{name}{start is first}" for name in ("a", "b", "direct"))
        glmquant.convert(source, a, start)
        result = glmquant.convert(a, b, end)
        glmquant.convert(source, direct, end)
        assert files(b) == files(direct)
        assert any("keep the codes they have; nothing is lost" in note for note in result.plan.notes)
        for entry in entries(b).values():
            assert (entry["relative_error"], entry["codes"]) == (0, "carried over")
        assert glmquant.verify(b, source=a).ok


@pytest.mark.parametrize(
    "target",
    [
        Recipe(group_size=32),
        Recipe(group_size=64, symmetric=False),
        Recipe(bits=8, group_size=32),
        Recipe(format="gptq", group_size=128),
        Recipe(format="gguf"),
        Recipe(format="gguf", symmetric=False),
        Recipe(format="gguf", bits=8),
    ],
    ids=lambda r: f"{r.format or CT}-{r.bits}-{r.group_size}-{'sym' if r.symmetric else 'asym'}",
)
def test_thudms_rows_are_exact_in_every_grid_that_holds_them(
    source: Path, tmp_path: Path, target: Recipe
) -> None:
    glmquant.convert(source, tmp_path / "cpm", Recipe(format=CPM))
    glmquant.convert(tmp_path / "cpm", tmp_path / "out", target)
    weights, exact = dequantized(tmp_path / "out"), dequantized(tmp_path / "cpm")
    fused = torch.cat([weights[name] for name in sorted(weights) if "down" in name or "4h_to_h" in name])
    assert torch.equal(fused, torch.cat([exact[name] for name in sorted(exact) if "4h_to_h" in name]))
    assert {entry["relative_error"] for entry in entries(tmp_path / "out").values()} == {0}
    assert glmquant.verify(tmp_path / "out", source=tmp_path / "cpm").ok


@pytest.mark.parametrize("bits", [4, 8])
def test_thudms_own_checkpoints_keep_their_codes(tmp_path: Path, bits: int) -> None:
    folder = GOLDEN / f"chatglm3-6b/tiny-int{bits}"
    glmquant.convert(folder, tmp_path / "out", Recipe(bits=bits, group_size="row", layout="original"))
    exact, found = dequantized(folder), dequantized(tmp_path / "out")
    assert exact.keys() == found.keys()
    assert all(torch.equal(exact[name], found[name]) for name in exact)
    glmquant.convert(tmp_path / "out", tmp_path / "back", Recipe(bits=bits, format=CPM))
    assert load_tensors(tmp_path / "back").keys() == load_tensors(folder).keys()
    for name, tensor in load_tensors(folder).items():
        assert torch.equal(load_tensors(tmp_path / "back")[name], tensor), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Recipe(bits=8), Recipe(bits=4)),
        (Recipe(group_size=32), Recipe(group_size=64)),
        (Recipe(symmetric=False, group_size=64), Recipe(group_size=64)),
        (Recipe(symmetric=False, group_size=32), Recipe(format="gguf", symmetric=False)),
        (Recipe(format="bitsandbytes"), Recipe(group_size=64)),
        (Recipe(format="gguf", symmetric=False), Recipe(symmetric=False, group_size=32)),
    ],
    ids=["8-to-4", "wider", "zero-points-gone", "zero-points-to-minima", "nf4", "minima-to-zero-points"],
)
def test_what_cannot_be_kept_is_quantized_again_and_said(
    source: Path, tmp_path: Path, first: Recipe, second: Recipe
) -> None:
    glmquant.convert(source, tmp_path / "a", first)
    result = glmquant.convert(tmp_path / "a", tmp_path / "b", second)
    (note,) = (note for note in result.plan.notes if "the source is quantized" in note)
    assert "quantized again, which loses more" in note
    assert all("codes" not in entry and entry["decoded_from"] for entry in entries(tmp_path / "b").values())
    assert glmquant.verify(tmp_path / "b", source=tmp_path / "a").ok


def test_sixteen_bits_of_a_quantized_model_say_so(source: Path, tmp_path: Path) -> None:
    glmquant.convert(source, tmp_path / "a")
    plan = make_plan(glmquant._open.open_source(tmp_path / "a").source, Recipe(bits=16))  # type: ignore[attr-defined]
    assert any("does not bring back what their quantization lost" in note for note in plan.notes)
    glmquant.convert(tmp_path / "a", tmp_path / "b", Recipe(bits=16))
    stored = open_folder(tmp_path / "b")
    for name, weight in dequantized(tmp_path / "a").items():
        assert torch.equal(stored.read(name), weight.half())


def test_scales_that_another_dtype_cannot_hold_are_rounded_and_counted(tmp_path: Path) -> None:
    """GLM-4 is bfloat16: its scales are exact in half unless they are tiny."""
    write_chatglm2(tmp_path / "source", torch.bfloat16)
    glmquant.convert(tmp_path / "source", tmp_path / "a", Recipe(group_size=64))
    glmquant.convert(tmp_path / "a", tmp_path / "b", Recipe(group_size=64, format="gptq"))
    assert {entry["relative_error"] for entry in entries(tmp_path / "b").values()} == {0}
    tensor = QUANTIZERS["rtn"](
        random_weight("gaussian", 8, 64, torch.bfloat16) * 1e-8, Scheme(4, 64, scale_dtype="bfloat16")
    )
    rounded = tensor.on_grid(Scheme(4, 64, scale_dtype="float16"))
    assert not torch.equal(rounded.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("grid", "other", "holds"),
    [
        (Scheme(4, 32), Scheme(4, 64), True),
        (Scheme(4, 64), Scheme(4, 32), False),
        (Scheme(4, 64), Scheme(4), True),
        (Scheme(4), Scheme(4, 64), False),
        (Scheme(8, 32), Scheme(4, 32), True),
        (Scheme(4, 32), Scheme(8, 32), False),
        (Scheme(4, 32, symmetric=False), Scheme(4, 32), True),
        (Scheme(4, 32), Scheme(4, 32, symmetric=False), False),
        (Scheme(4, 32, symmetric=False, minimum=True), Scheme(4, 32, symmetric=False), False),
        (Scheme(4, 32, symmetric=False, minimum=True), Scheme(4, 64, symmetric=False, minimum=True), True),
        (Scheme(4, 64, scale_dtype="float32", book="nf4"), Scheme(4, 64), False),
        (Scheme(8, 64), Scheme(4, 64, scale_dtype="float32", book="nf4"), False),
    ],
)
def test_which_grids_hold_which(grid: Scheme, other: Scheme, holds: bool) -> None:
    assert grid.holds(other) is holds
    if holds:
        method = QUANTIZERS["rtn"]
        tensor = method(random_weight("shifted", 16, 128), other)
        assert torch.equal(tensor.on_grid(grid).dequantize(), tensor.dequantize())
