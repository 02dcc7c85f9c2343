"""``glmquant check --measure``: runs that succeed, and those that fail as gates that do."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from helpers_convert import config, run_cli, small_source, tensors, write_source

import glmquant
from glmquant import Recipe, cli, convert

Run = Callable[..., Result]
CPU = ["--measure", "--device", "cpu", "--context", "64"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return convert(small_source(folder / "source"), folder / "out", Recipe(method="rtn")).out


@pytest.fixture
def run() -> Run:
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def failed(junit: Path) -> list[tuple[str, str]]:
    """Test cases of a report, all of which have failed, and what they say."""
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["failures"] == suite.attrib["tests"] == str(len(suite))
    return [(case.attrib["name"], case[0].attrib["message"]) for case in suite]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_an_error(run: Run, out: Path) -> None:
    result = run("check", out, "--vram", "2GiB", "--context", "64", "--measure")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr


def test_measuring_on_a_cpu(run: Run, out: Path) -> None:
    result = run("check", out, *CPU, "--json", "--vram", "4GiB")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    measured = shown["measured"]
    assert 2**27 < measured["process_loaded"] <= measured["process"] < 2**32
    assert [gate["found"] for gate in shown["gates"]] == [measured["process"]]
    assert run("check", out, *CPU, "--vram", "10MiB").exit_code == 1


@pytest.mark.parametrize(
    ("of", "name"), [("nvml", "VRAM, process by NVML"), ("device", "VRAM, all of the GPU's")]
)
def test_a_gpu_has_two_gates(
    of: str, name: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"process": 900, "process_loaded": 500, "allocated": 400, "reserved": 600, "of": of}
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, json.dumps(found), "")
    )
    for limit, passed in ((1000, [True, True]), (800, [True, False]), (300, [False, False])):
        check = glmquant.check(out, memory_limit=limit, context=64, measure=True)
        assert [(g.name, g.found, g.ok) for g in check.gates] == [
            ("VRAM, torch's peak", 400, passed[0]),
            (name, 900, passed[1]),
        ]
        assert check.ok == all(passed)
        assert check.prediction_error.keys() == {"allocated", "process"}


def limited() -> None:
    """Room for the libraries, and not for 30000 sequences."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))


def test_memory_that_runs_out_is_a_failed_gate(out: Path, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    options = ["check", out, *CPU, "--batch", 30000, "--vram", "1GiB", "--junit", junit]
    done = run_cli(*options, preexec_fn=limited)
    assert done.returncode == 1, done.stderr
    said = "memory ran out while it ran (30000 x 64 tokens on cpu)"
    assert f"FAILED: memory, measured: {said}\n" in done.stdout
    assert done.stderr == ""
    assert failed(junit) == [("memory, measured", f"memory, measured: {said}")]
    shown = json.loads(run_cli(*options, "--json", preexec_fn=limited).stdout)
    assert (shown["ok"], shown["measured"], shown["gates"][0]["fault"]) == (False, None, said)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ((-signal.SIGKILL, "", ""), "it was killed while it ran, most likely because memory ran out"),
        ((-signal.SIGSEGV, "", ""), "it was ended by signal 11"),
        ((1, "", "Traceback ...\nImportError: no such thing.\n"), "could not be run: ImportError: no such thing"),
    ],
)  # fmt: skip
def test_a_process_that_ends_is_a_failed_gate(
    ended: Any, said: str, run: Run, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, *ended))
    junit = tmp_path / "check.xml"
    result = run("check", out, *CPU, "--max-file-size", "1B", "--junit", junit)
    assert result.exit_code == 1, result.output
    assert said in result.stdout
    assert [name for name, _ in failed(junit)] == ["memory, measured", "largest file"]


@pytest.mark.parametrize("context", [64, 1])
def test_logits_that_are_no_numbers_are_a_failed_gate(context: int, run: Run, tmp_path: Path) -> None:
    weights = tensors(config())
    weights["transformer.output_layer.weight"][7, 3] = torch.nan
    folder = write_source(tmp_path / "broken", weights, config())
    junit = tmp_path / "check.xml"
    options = ["--measure", "--device", "cpu", "--context", context, "--vram", "8GiB"]
    result = run("check", folder, *options, "--junit", junit)
    assert result.exit_code == 1, result.output
    assert "FAILED: memory, measured: its logits are NaN or infinite; run `glmquant verify`" in result.stdout
    assert len(failed(junit)) == 1
