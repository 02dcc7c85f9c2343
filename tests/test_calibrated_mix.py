"""``--fit`` with a calibrated method: bits by the sensitivities of a text, and every layer solved whatever its bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers_calibrated import calibrated, chatglm3, divergence, output_errors, two_texts
from test_fit import middle

import glmquant
from glmquant import Fit, Recipe, cli
from glmquant.calibration import Calibrator
from glmquant.checkpoint.output import REPORT
from glmquant.recipe import Choice


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatglm3(tmp_path_factory.mktemp("source") / "model", outliers=4)


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "measured-mix"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr("glmquant._sensitivity.cache_folder", lambda kind: folder)


def choices(report: dict[str, Any]) -> list[tuple[int, Any]]:
    return [(c["bits"], c["group_size"]) for c in report["recipe"]["fit"]["choices"]]


def test_bits_follow_the_text_and_layers_are_solved(
    source: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    seen, unseen = texts
    budget = str(middle(source))
    reports = {}
    for method in ("mse", "gptq"):
        given = ["--calibration", str(seen), "--calibration-windows", "2"] if method == "gptq" else []
        command = ["convert", str(source), str(tmp_path / method), "--fit", budget, "--context", "64"]
        result = CliRunner().invoke(cli.main, [*command, "--method", method, *given, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        reports[method] = json.loads((tmp_path / method / REPORT).read_text())
        assert len({bits for bits, _ in choices(reports[method])}) > 1
        assert glmquant.verify(tmp_path / method, source=source).ok
        checked = CliRunner().invoke(cli.main, ["check", str(tmp_path / method)])
        assert checked.exit_code == 0, checked.output
    assert choices(reports["gptq"]) != choices(reports["mse"])  # what the text says, and what norms say
    divergences = {method: divergence(tmp_path / method, source, unseen) for method in reports}
    assert divergences["gptq"] <= divergences["mse"]
    stated = reports["gptq"]["recipe"]["fit"]
    alike = Fit(stated["budget"], 64, choices=tuple(Choice(**choice) for choice in stated["choices"]))
    glmquant.convert(source, tmp_path / "alike", Recipe(method="mse", fit=alike), device="cpu")
    errors = [output_errors(tmp_path / name, source, unseen) for name in ("gptq", "alike")]
    assert all(solved <= rounded for solved, rounded in zip(*errors, strict=True))
    assert sum(errors[0]) < 0.5 * sum(errors[1])


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_same_bytes_on_every_run_and_after_an_interruption(
    source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    wanted = calibrated(method, texts[0], fit=Fit(middle(source), 64))
    whole = glmquant.convert(source, tmp_path / "whole", wanted, device="cpu", workers=1).report
    usual = Calibrator._quantized

    def killed(self: Calibrator, layer: int) -> Any:
        if layer == 1:
            raise _Killed
        return usual(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(Calibrator, "_quantized", killed)
        with pytest.raises(_Killed):
            glmquant.convert(source, tmp_path / "out", wanted, device="cpu")
    resumed = glmquant.convert(source, tmp_path / "out", wanted, device="cpu", resume=True).report
    assert resumed == whole
    assert glmquant.verify(tmp_path / "out", source=source).ok
