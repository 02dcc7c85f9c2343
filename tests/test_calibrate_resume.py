"""Conversions with calibrated methods that end early: what is kept, and what of it a later run believes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_convert import content, flip_byte, partial_of, run_cli, start_cli, wait_until
from helpers_sources import CHATGLM2, write_model
from test_evaluate import TEXT, opinionated
from test_original_tokenizers_tiny import sentencepiece_folder

import glmquant
from glmquant import Recipe
from glmquant.calibration import Calibrator
from glmquant.recipe import Calibration

LAYERS = 4
WINDOW = 32
KEPT = ".glmquant-calibrated"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sentencepiece_folder(tmp_path_factory.mktemp("models") / "model", "chatglm3-6b")
    config = {**CHATGLM2, "padded_vocab_size": 512, "num_layers": LAYERS}
    return write_model(folder, config, opinionated(config))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    return Recipe(method="gptq", group_size=32, calibration=Calibration(str(text), 4, WINDOW))


@pytest.fixture(scope="module")
def undisturbed(source: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(
        glmquant.convert(source, tmp_path_factory.mktemp("whole") / "out", recipe, device="cpu").out
    )


class _Killed(BaseException):
    pass


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are calibrated; the first run ends when it comes to block 3."""
    found: list[int] = []
    killed: list[_Killed] = []
    usual = Calibrator._quantized

    def quantized(self: Calibrator, layer: int) -> Any:
        found.append(layer)
        if layer == 3 and not killed:
            killed.append(_Killed())
            raise killed[0]
        return usual(self, layer)

    monkeypatch.setattr(Calibrator, "_quantized", quantized)
    return found


@pytest.fixture
def kept(source: Path, recipe: Recipe, tmp_path: Path, begun: list[int]) -> Path:
    """What a run has left that ended in block 3."""
    with pytest.raises(_Killed):
        glmquant.convert(source, tmp_path / "out", recipe, device="cpu")
    begun.clear()
    folder = partial_of(tmp_path / "out") / KEPT
    assert sorted(path.name for path in folder.iterdir()) == [
        "hashes.json", *(f"layer-{n}.safetensors" for n in range(3)), "states-1.safetensors", "states-2.safetensors"
    ]  # fmt: skip
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "harm", "again"),
    [
        ("layer-0.safetensors", flip_byte, [0, 1, 2, 3]),
        ("layer-1.safetensors", _cut, [0, 1, 2, 3]),
        ("layer-2.safetensors", Path.unlink, [2, 3]),
        ("states-1.safetensors", _cut, [3]),
        ("states-2.safetensors", flip_byte, [2, 3]),
        ("states-2.safetensors", _cut, [2, 3]),
        ("hashes.json", _cut, [0, 1, 2, 3]),
    ],
)
def test_what_is_not_as_it_was_is_made_again(
    source: Path,
    recipe: Recipe,
    undisturbed: dict[str, bytes],
    kept: Path,
    begun: list[int],
    file: str,
    harm: Callable[[Path], object],
    again: list[int],
) -> None:
    harm(kept / file)
    out = kept.parent.with_suffix("")
    glmquant.convert(source, out, recipe, device="cpu", resume=True)
    assert content(out) == undisturbed
    assert begun == again


def test_blocks_of_nobody_knows_which_recipe_are_made_again(
    source: Path, recipe: Recipe, undisturbed: dict[str, bytes], kept: Path, begun: list[int]
) -> None:
    (kept.parent / ".glmquant-journal.json").write_text("{")
    out = kept.parent.with_suffix("")
    glmquant.convert(source, out, recipe, device="cpu", resume=True)
    assert begun == [0, 1, 2, 3]
    assert content(out) == undisturbed


def test_another_number_of_threads_is_not_resumed(source: Path, recipe: Recipe, kept: Path) -> None:
    """It gives other bytes; these blocks would not go together."""
    out, threads = kept.parent.with_suffix(""), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(glmquant.OutputError, match="another number of threads"):
            glmquant.convert(source, out, recipe, device="cpu", resume=True)
    finally:
        torch.set_num_threads(threads)
    assert (kept / "layer-2.safetensors").exists()


@pytest.mark.slow
def test_kills_in_a_row(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Every resumed run gets a block further, and is killed too."""
    assert recipe.calibration is not None
    options = [
        "--method", "gptq", "--group-size", 32, "--device", "cpu", "--calibration", recipe.calibration.text,
        "--calibration-windows", recipe.calibration.windows,
    ]  # fmt: skip
    whole = run_cli("convert", source, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    kills = 0
    for block in range(LAYERS - 1):
        process = start_cli("convert", source, out, *options, "--resume")
        states = partial_of(out) / KEPT / f"states-{block}.safetensors"
        wait_until(lambda file=states, run=process: file.exists() or run.poll() is not None)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if out.exists():
            break  # it was faster than we
    assert kills
    if not out.exists():
        last = run_cli("convert", source, out, *options, "--resume")
        assert last.returncode == 0, last.stderr
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), r"\(CUDA out of memory\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), r"allocate memory"),
        (MemoryError(), "memory ran out; what is done is kept"),
        (RuntimeError("a bug"), "^a bug$"),
        (glmquant.ModelError("layer 3 gives NaN"), None),
    ],
    ids=["gpu", "cpu", "python", "bug", "nan"],
)
def test_only_what_is_wrong_with_the_model_costs_the_blocks_that_are_done(
    source: Path,
    recipe: Recipe,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str | None,
) -> None:
    usual = Calibrator._quantized

    def fails(self: Calibrator, layer: int) -> Any:
        if layer == 1:
            raise error
        return usual(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(Calibrator, "_quantized", fails)
        with pytest.raises(Exception, match=said) as caught:
            glmquant.convert(source, tmp_path / "out", recipe, device="cpu")
    if said is None:
        assert list(tmp_path.iterdir()) == []
        return
    assert (partial_of(tmp_path / "out") / KEPT / "layer-0.safetensors").exists()
    if "bug" not in said:
        assert isinstance(caught.value, glmquant.OutOfMemoryError)
        assert "same command with --resume" in str(caught.value)
    glmquant.convert(source, tmp_path / "out", recipe, device="cpu", resume=True)
    assert content(tmp_path / "out") == undisturbed
