"""`glmquant bench`: every runtime on small models, failures as rows, and what is made of the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_models import expected
from helpers_sources import CHATGLM2, random_tensors, write_model

import glmquant
from glmquant import Recipe
from glmquant._bench_cli import PEERS
from glmquant.bench import harness, report
from glmquant.bench.cases import Candidate, Result, Trial, Workload
from glmquant.bench.runtimes import RUNTIMES
from glmquant.bench.worker import measure
from glmquant.cli import main

WORKLOAD = Workload(prompt=8, new=4, batches=(1, 3), warmup=0, repetitions=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "source", CHATGLM2, random_tensors(CHATGLM2))
    glmquant.convert(root / "source", root / "int4", Recipe())
    return {"source": root / "source", "int4": root / "int4"}


@pytest.mark.parametrize("name", ["chatglm-6b/tiny-3l-int4", "chatglm2-6b/tiny-int8", "glm-4-9b-chat/tiny"])
def test_every_generation_is_measured(name: str) -> None:
    folder, _ = expected(name)
    result = measure(Candidate(str(folder), device="cpu", dtype="float32"), WORKLOAD)
    assert (result.error, result.device, result.dtype) == (None, "cpu", "float32")
    assert [trial.batch for trial in result.trials] == [1, 1, 3, 3]
    assert all(trial.first_token_seconds > 0 and trial.decode_seconds > 0 for trial in result.trials)
    assert result.memory["process"] > 50 << 20


def test_the_bytes_of_weights_are_those_in_memory(models: dict[str, Path]) -> None:
    packed, plain, source = (
        measure(Candidate(str(models[name]), runtime, "cpu", "float16"), WORKLOAD)
        for name, runtime in (("int4", "glmquant"), ("int4", "16bit"), ("source", "glmquant"))
    )
    stored = sum(p.nbytes for p in glmquant.load(models["int4"], "cpu", "float16").parameters())
    assert stored <= packed.weight_bytes <= stored + 1024  # and the rotary frequencies
    assert plain.weight_bytes == source.weight_bytes > 1.5 * packed.weight_bytes


@torch.inference_mode()
def test_peers_multiply_by_the_same_weights(models: dict[str, Path]) -> None:
    ids = torch.arange(10)[None]
    candidate = Candidate(str(models["int4"]), device="cpu", dtype="float32")
    wanted = RUNTIMES["glmquant"](candidate)(ids).logits
    for runtime in ("16bit", "dequantize"):
        torch.testing.assert_close(RUNTIMES[runtime](candidate)(ids).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("runtime", ["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"])
@torch.inference_mode()
def test_peers_that_are_installed(models: dict[str, Path], runtime: str) -> None:
    pytest.importorskip(runtime.partition("-")[0])
    ids = torch.arange(10)[None]
    source = Candidate(str(models["source"]), device="cpu", dtype="float32")
    wanted = RUNTIMES["glmquant"](source)(ids).logits
    found = RUNTIMES[runtime](source)(ids).logits
    assert not found.equal(wanted)  # it is quantized
    error = (found - wanted).norm() / wanted.norm()
    assert error < (0.2 if "nf4" in runtime else 0.02)


def test_the_command_line_knows_every_peer() -> None:
    assert ("glmquant", *PEERS) == tuple(RUNTIMES)


def test_what_fails_is_a_row_that_says_why(models: dict[str, Path]) -> None:
    source = str(models["source"])
    candidates = [Candidate(source, device="cpu"), Candidate(source, "dequantize", "cpu")]
    steps: list[tuple[int, int, str]] = []
    found = harness.run(candidates, Workload(8, 3, (1,), 0, 1), lambda *step: steps.append(step))
    assert steps == [(0, 2, f"{source} (glmquant)"), (1, 2, f"{source} (dequantize)"), (2, 2, "")]
    good, bad = found["results"]
    assert good["error"] is None
    assert bad["error"] == f"{source} is not quantized, so there is nothing to dequantize."
    assert {"commit", "hardware", "versions", "workload"} <= found.keys()
    lines = report.text(found).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("failed: " + bad["error"])


def test_a_process_that_is_killed_is_a_row(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["/bin/sh", "-c", "kill -9 $$"]
    real = harness.subprocess.run
    monkeypatch.setattr(
        harness.subprocess,
        "run",
        lambda given, **kw: real(command if "glmquant.bench.worker" in given else given, **kw),
    )
    found = harness.run([Candidate(str(models["source"]))], WORKLOAD)
    assert "SIGKILL, which is how Linux ends what takes too much memory" in found["results"][0]["error"]


@pytest.fixture
def made() -> dict[str, Any]:
    """A report with known figures."""
    trials = tuple(Trial(2, first, decode) for first, decode in ((0.5, 3.0), (0.25, 1.5), (1.0, 6.0)))
    good = Result(Candidate("models/a"), None, "cpu", "float32", 1.25, 3 << 30, {"process": 4 << 30}, trials)
    bad = Result(Candidate("models/b|c", "16bit"), "no such weights")
    return {
        "hardware": {"cpu": "An Abacus", "cores": 2}, "versions": {"torch": "2.13.0"},
        "workload": {"prompt": 100, "new": 31, "batches": [2], "warmup": 1, "repetitions": 3},
        "results": [good.to_json(), bad.to_json()],
    }  # fmt: skip


def test_speeds_are_medians_of_all_sequences_together(made: dict[str, Any]) -> None:
    made = json.loads(json.dumps(made))
    header, good, bad = report.table(made)
    assert len(header) == len(good)
    assert good == (
        "a", "glmquant", "float32", "2", "1.2", "3.00", "4.00", "0.5 (0.25-1)", "400 (200-800)", "20 (10-40)"
    )  # fmt: skip
    assert bad == ("b|c", "16bit", "no such weights")


def test_markdown(made: dict[str, Any]) -> None:
    lines = report.markdown(made).splitlines()
    assert lines[1] == "|---|---|" + "---:|" * 8
    assert lines[3].startswith(r"| b\|c | 16bit | failed: no such weights |")
    assert {line.replace(r"\|", "").count("|") for line in lines[:4]} == {11}
    assert "An Abacus, 2 cores; torch 2.13.0" in lines[-1]


def test_plot(made: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(made, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(glmquant.UsageError, match="cannot be written"):
        report.plot(made, tmp_path / "out.abc")
    with pytest.raises(glmquant.UsageError, match="nothing to plot"):
        report.plot({**made, "results": made["results"][1:]}, tmp_path / "none.png")


def test_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        "bench",
        str(models["int4"]),
        "--peer",
        "16bit",
        "--prompt",
        "8",
        "--new",
        "3",
        "--device",
        "cpu",
    ]
    arguments += ["--warmup", "0", "--repetitions", "1", "--json", "--markdown", str(tmp_path / "table.md")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [result["candidate"]["runtime"] for result in found["results"]] == ["glmquant", "16bit"]
    assert (tmp_path / "table.md").read_text().splitlines()[2].startswith("| int4 | glmquant |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1,0"], "use whole numbers from 1 on"),
        (["--batch", "x"], "use whole numbers from 1 on"),
        (["--peer", "abacus"], "'abacus' is not one of"),
        (["--plot", "nowhere/out.png"], "its folder does not exist"),
        (["--new", "1"], "--new"),
    ],
)
def test_bad_options(models: dict[str, Path], options: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", str(models["int4"]), *options])
    assert done.exit_code == 2
    assert message in done.output


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no config.json" in done.output
