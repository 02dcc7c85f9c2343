"""The benchmarks for GPUs, tiny and on a CPU: that the programs work. What they measure here means nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import matmul


def test_every_section_that_needs_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(out)])
    assert program.main() == 0, out.read_text()
    found = json.loads(out.read_text())
    products = found["matmul"]["results"]["products"]
    ways = {"bf16", *matmul.SCHEMES, "thudm int4-g128"}
    assert ways <= {row["way"] for row in products}
    assert {row["rows"] for row in products} == {1, 3, 20}
    assert all(row["error"] < 0.02 and row["same_again"] for row in products if row["way"] in ways)
    models = found["end_to_end"]["results"]
    assert {(row["precision"], row["way"]) for row in models} == {
        *((precision, way) for precision in ("bf16", "int8", "int4") for way in ("graph", "eager")), ("int4", "thudm"),
    }  # fmt: skip
    assert all(row["prefill_tokens/s"] > 0 for row in models)
    memory = found["memory"]["results"]
    assert {(row["recipe"], row["batch"]) for row in memory} == {
        (r, b) for r in ("int4", "int8") for b in (1, 4)
    }
    assert all(row["process_measured_MiB"] > 0 < row["predicted_MiB"] + 1 for row in memory)


def test_it_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert program.main() == 2
    assert "no GPU" in capsys.readouterr().err
