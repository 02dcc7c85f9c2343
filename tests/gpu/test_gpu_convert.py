"""``convert --device cuda``: the folder that the CPU writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_convert import content, run_cli, small_source

import glmquant
from glmquant import Recipe

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

RECIPES = {
    "int4": Recipe(),
    "asymmetric": Recipe(symmetric=False, group_size=32, method="rtn"),
    "int8-row": Recipe(bits=8, group_size="row", quantize_head=True, quantize_embeddings=True),
    "cpm": Recipe(format="cpm"),
    "cpm-8-mse": Recipe(bits=8, format="cpm", method="mse"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"layers": 3, "hidden": 512, "ffn": 1536, "vocab": 9001}
    return small_source(tmp_path_factory.mktemp("source") / "small", **sizes)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_same_folder(recipe: Recipe, workers: int, source: Path, tmp_path: Path) -> None:
    glmquant.convert(source, tmp_path / "cpu", recipe, device="cpu")
    assert glmquant.convert(source, tmp_path / "gpu", recipe, device="cuda", workers=workers).hints == ()
    found, expected = content(tmp_path / "gpu"), content(tmp_path / "cpu")
    assert [name for name in expected if found[name] != expected[name]] == []


def test_short_memory(source: Path, tmp_path: Path) -> None:
    glmquant.convert(source, tmp_path / "cpu", device="cpu")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)  # about a megabyte
    try:
        done = glmquant.convert(source, tmp_path / "gpu", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "quantized on the CPU" in done.hints[0]
    assert content(tmp_path / "gpu") == content(tmp_path / "cpu")


def test_command_line(source: Path, tmp_path: Path) -> None:
    for package in ("click", "rich"):
        pytest.importorskip(package)
    done = run_cli("convert", source, tmp_path / "out", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert "GPU" not in done.stdout
