"""The benchmarks for GPUs, tiny and on a CPU: that the programs work. What they measure here means nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_triton import as_on_a_gpu, interpreted, needs_interpreter  # noqa: F401

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import matmul


def test_every_section(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in program.LIMITS:
        program._run_here(name, tmp_path, dry=True)
        found[name] = [json.loads(line) for line in (tmp_path / f"{name}.rows").read_text().splitlines()]
    assert [row["what"] for row in found["bandwidth"]] == [
        "device to device", "pinned to device", "device to pinned",
    ]  # fmt: skip
    products = [row for row in found["matmul"] if "failed" not in row]
    ways = {"bf16", *matmul.SCHEMES, "thudm int4-g128"}
    assert ways <= {row["way"] for row in products}
    assert {row["rows"] for row in products} == {1, 3, 20}
    assert all(row["error"] < 0.02 and row["same_again"] for row in products if row["way"] in ways)
    failed = {row["way"]: row["failed"] for row in found["matmul"] if "failed" in row}
    assert failed["humming int4-g128"] == "RuntimeError: the weights are on cpu"
    assert {(row["precision"], row["way"]) for row in found["end_to_end"]} == {
        *((precision, way) for precision in ("bf16", "int8", "int4") for way in ("graph", "eager")), ("int4", "thudm"),
    }  # fmt: skip
    assert all(row["prefill_tokens/s"] > 0 for row in found["end_to_end"])
    (memory,) = found["memory"]
    assert (memory["recipe"], memory["batch"]) == ("int4", 2)
    assert memory["process_measured_MiB"] > 0 < memory["process_predicted_MiB"]
    (conversion,) = found["convert"]
    assert conversion["first"]
    assert conversion["same_bytes"]
    assert {row["what"] for row in found["kernels"]} > {"mse-int4-g128", "dequantize-int8"}


def test_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    options = ["--dry", "--only", "bandwidth", "--tests", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    assert program.main() == 0, out.read_text()
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["tests_status"]) == ("gpu", 0)
    assert len(document["bandwidth"]["results"]) == 3
    assert document["bandwidth"]["seconds"] > 0
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--seconds", "0"])
    assert program.main() == 1
    assert "no time left" in json.loads(out.read_text())["bandwidth"]["failed"]


def test_sections_that_fail_or_take_too_long_keep_what_they_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = '{"a": 1}\\n{"b": 2}\\n{"c'
    write = f"open(sys.argv[sys.argv.index('--folder') + 1] + '/matmul.rows', 'w').write('{rows}')"

    def ends(code: str, limit: float) -> dict[str, Any]:
        fake = tmp_path / "python"
        fake.write_text(f"#!{python}\nimport sys, time\n{write}\n{code}\n")
        fake.chmod(0o755)
        return list(program._run_beside("matmul", limit, tmp_path, False))[-1]

    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(program, "_PERIOD", 0.05)
    died = ends("print('on the way'); sys.exit('no more memory')", 60)
    assert died["results"] == [{"a": 1}, {"b": 2}]
    assert "no more memory" in died["failed"]
    started = time.monotonic()
    slow = ends("time.sleep(60)", 1)
    assert (slow["results"], slow["failed"]) == ([{"a": 1}, {"b": 2}], "stopped after 1 seconds")
    assert time.monotonic() - started < 30
    assert "failed" not in ends("", 60)
    assert ends("", 0)["failed"] == "there was no time left"


@needs_interpreter
@pytest.mark.usefixtures("as_on_a_gpu")
def test_products_by_tritons_kernels() -> None:
    """As on a GPU, in the interpreter: weights are interleaved, and their kernel is chosen for few rows."""
    weight = torch.randn(32, 128).to(torch.bfloat16)
    for name, scheme in matmul.SCHEMES.items():
        way = matmul._packed(scheme, matmul._linear, None, weight, 1 << 12)
        assert way.weights[0].packed.dim() == 3
        for m, chosen in ((2, "Triton kernel"), (17, "PyTorch, tile by tile")):
            row = matmul._figures(way, m)
            assert (row["chosen"], row["error"] < 0.02) == (chosen, True), name


def test_it_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert program.main() == 2
    assert "no GPU" in capsys.readouterr().err
