"""`benchmarks.report`: what is committed is what the results give, and what it makes of each kind of result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from glmquant.bench import report as bench

pytest.importorskip("matplotlib")

COMMON = {
    "commit": "0123456789abcdef", "hardware": {"cpu": "An Abacus", "cores": 2, "memory_gib": 4.0},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip


def rendered(tmp_path: Path, **results: dict[str, Any]) -> str:
    folder = tmp_path / "results"
    folder.mkdir(exist_ok=True)
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps({**COMMON, **result}))
    plots = tmp_path / "plots"
    plots.mkdir(exist_ok=True)
    return report.render(folder, plots)


def test_the_committed_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    fresh = report.render(report.HERE / "results", tmp_path / "plots")
    assert fresh == (report.HERE / "REPORT.md").read_text(encoding="utf-8"), "run `make report`"
    made, kept = ({p.name for p in f.iterdir()} for f in (tmp_path / "plots", report.HERE / "plots"))
    assert made == kept
    assert set(re.findall(r"\(plots/(.*?)\)", fresh)) == made


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_tables_in_the_readme_are_those_of_the_results(readme: str) -> None:
    results, text = report.HERE / "results", (report.HERE.parent / readme).read_text(encoding="utf-8")
    served = report.serve_table(json.loads((results / "serve.json").read_text()))[1:]
    decoded = json.loads((results / "cpu-decode.json").read_text())["models"]["chatglm3-6b-8-layers"]
    rows = [row[1:] for row in (*served, *report.decode_table(decoded)[1:])]  # less what is translated
    assert len(rows) > 3
    for row in rows:
        assert f" | {' | '.join(row)} |\n" in text, "copy the table of benchmarks/REPORT.md"


def test_every_section_has_a_title_of_its_own_and_a_plot() -> None:
    _, *sections = re.split("^## ", (report.HERE / "REPORT.md").read_text(encoding="utf-8"), flags=re.M)
    titles = [section.partition("\n")[0] for section in sections]
    assert len(set(titles)) == len(titles) >= len(list(report.HERE.glob("results/*.json")))
    for section in sections:
        assert "![" in section or section.startswith("On a GPU")
        assert "|---|" in section
        assert "unknown" not in section


def test_servers_are_side_by_side_with_what_they_got_wrong(tmp_path: Path) -> None:
    row = {
        "clients": 4, "requests": 8, "tokens_per_second": 57.46, "first_token_median": 0.1241,
        "between_tokens_median": 0.0618, "lost": 1, "same": 7, "mixed_up": 0,
    }  # fmt: skip
    result = {
        "benchmark": "serve", "model": "m", "weights": "INT4", "peer": "theirs", "slots": 16, "context": 512,
        "new_tokens": 32, "threads": 2, "rows": [{"server": "glmquant", **row}, {"server": "theirs", **row, "same": 8}],
    }  # fmt: skip
    text = rendered(tmp_path, serve=result)
    assert "## Serving: m" in text
    assert "| 4 | 8 | 57 | 57 | 0.12 s | 0.12 s | 62 ms | 62 ms | 7 of 8 | 8 of 8 |" in text
    assert "Requests lost: 2; answered with another's answer: 0." in text
    assert b"clients at a time" in (tmp_path / "plots" / "serve.svg").read_bytes()
    alone = rendered(tmp_path, serve={**result, "rows": result["rows"][:1]})
    assert "| 4 | 8 | 57 | 0.12 s | 62 ms | 7 of 8 |" in alone


def test_decoding_of_several_models_is_a_section_each(tmp_path: Path) -> None:
    speeds = {"prefill": 161.8, "decode 1": 21.1, "decode 4": 49.4}
    one = {
        **COMMON, "threads": 2, "trials": [{"trial": 2}],
        "summary": {
            "tokens_per_second": {"int4": speeds, "bf16": speeds, "llama.cpp Q4_0": speeds},
            "read_gb_per_second": {"huge pages": 33.5},
            "int4 / llama.cpp Q4_0": {"prefill": 1.76, "decode 1": 0.974, "decode 4": 1.0},
            "int4, weights read at batch 1": {"gb_per_second": 29.0},
        },
    }  # fmt: skip
    text = rendered(tmp_path, decode={"benchmark": "cpu-decode", "models": {"a": one, "b": one}})
    assert "## Decoding on a CPU: a" in text
    assert "## Decoding on a CPU: b" in text
    speeds_shown = "161.8 | 21.1 | 49.4 |\n"
    assert (
        f"| INT4, groups of 128 | {speeds_shown}| llama.cpp Q4_0 | {speeds_shown}"
        f"| ratio within a round | 1.76 | 0.97 | 1.00 |\n| bfloat16, PyTorch | {speeds_shown}"
    ) in text
    assert "| INT4, groups of 128 | 29.0 |" in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"decode-a.svg", "decode-b.svg"}


def test_the_memory_of_committed_runs_was_predicted() -> None:
    """Resident memory on a CPU within 5 %, torch's peak on a GPU within 3 %."""
    compared = 0
    for path in report.HERE.glob("results/run-*.json"):
        for result in bench.parse(json.loads(path.read_text()))[1]:
            if result.predicted is not None:
                on_cpu = result.device == "cpu"
                found = result.memory["process" if on_cpu else "allocated"]
                predicted = result.predicted["peak" if on_cpu else "allocated"]
                assert predicted == pytest.approx(found, rel=0.05 if on_cpu else 0.03), result.candidate
                compared += 1
    assert compared >= 3


def test_conversions_are_medians_beside_cp(tmp_path: Path) -> None:
    def trial(what: str, cache: str, number: int, seconds: float) -> dict[str, Any]:
        return {"what": what, "cache": cache, "trial": number, "seconds": seconds}

    trials = [
        trial(what, cache, n, n + 1.0)
        for what in ("cp", "mse")
        for cache in ("cold", "warm")
        for n in range(3)
    ]
    figures = {"median_seconds": 2.0, "median_ratio_to_cp": 1.25, "worst_peak_anonymous_mib": 99.6}
    summary = {f"{what}.{cache}": figures for what in ("cp", "mse") for cache in ("cold", "warm")}
    result = {
        "benchmark": "convert", "model": "m", "source_bytes": 4.3e9, "source_files": 3, "trials": trials,
        "summary": summary,
    }  # fmt: skip
    text = rendered(tmp_path, convert=result)
    assert "## Converting: m" in text
    assert "4.3 GB in 3 files, medians of 3 trials." in text
    assert "| convert --method mse | 2.0 | 1.25 | 2.0 | 1.25 | 100 |" in text
    assert "Commit 0123456789ab; An Abacus, 2 cores, 4.0 GiB; torch 2.13.0; [convert.json]" in text
    plot = tmp_path / "plots" / "convert.svg"
    first = plot.read_bytes()
    assert b"cold cache" in first
    assert rendered(tmp_path) == text
    assert plot.read_bytes() == first


def test_quality_has_standard_errors(tmp_path: Path) -> None:
    def figure(value: float, error: float | None = None) -> dict[str, float | None]:
        return {"value": value, "error": error}

    judged = {
        "kl_mean": figure(0.4341, 0.01), "perplexity_ratio": figure(1.6111, 0.02), "top1_agreement": figure(0.646)
    }  # fmt: skip
    trial = {"recipe": "INT4, g32", "linear_bits": 4.5, "cpu_seconds": 2.4, "peak_anonymous_mib": 169}
    peer = {"recipe": "a peer", "linear_bits": 4.5}
    result = {
        "benchmark": "quality", "summary": {"mse / rtn": 0.7}, "windows": {"same kind": [6, 512, "0123"]},
        "trials": [*({**each, "same kind": judged} for each in (trial, peer)),
                   {"recipe": "another peer", "missing": "no such package"}],
    }  # fmt: skip
    text = rendered(tmp_path, quality=result)
    assert "| INT4, g32 | 4.50 | 2 | 169 | 0.434 ± 0.01 | 1.611 ± 0.02 | 64.6 % |" in text
    assert "| a peer | 4.50 |  |  | 0.434 ± 0.01 |" in text
    assert "Not measured: another peer (no such package)." in text
    assert "| mse / rtn | 0.7 |" in text
    assert b"INT4, g32" in (tmp_path / "plots" / "quality.svg").read_bytes()


def test_a_run_shows_memory_by_term(tmp_path: Path) -> None:
    from glmquant.bench.cases import Candidate, Result, Trial

    predicted = {
        "weights": 2 << 30,
        "scales": 0,
        "rest": 0,
        "cache": 1 << 28,
        "process_base": 1 << 29,
        "peak": 3 << 30,
    }
    memory = {"process": 3 << 30, "base": 1 << 29, "cache": 1 << 28}
    good = Result(
        Candidate("a"), None, "cpu", "bfloat16", 1.0, 2 << 30, memory, (Trial(1, 0.5, 1.5),), predicted
    )
    bad = Result(Candidate("b", "torchao-int8"), "ModuleNotFoundError: no torchao")
    result = {
        "benchmark": "bench", "model": "m", "results": [good.to_json(), bad.to_json()],
        "workload": {"prompt": 100, "new": 31, "batches": [1], "warmup": 1, "repetitions": 1},
    }  # fmt: skip
    text = rendered(tmp_path, run=result)
    assert "0.500 / 0.500 | 2.000 / 2.000 | 0.250 / 0.250 | 0.250 / 0.250 | 3.000 / 3.000 | +0.0 % |" in text
    assert "failed: ModuleNotFoundError: no torchao" in text
    plot = (tmp_path / "plots" / "run.svg").read_bytes()
    for word in (b"predicted", b"measured", b"KV cache", b"tokens per second"):
        assert word in plot
    failed = rendered(tmp_path, run={**result, "results": [bad.to_json()]})
    assert "plots/" not in failed
    assert not (tmp_path / "plots" / "run.svg").exists()


def test_a_benchmark_that_is_not_known_is_shown_by_its_summary(tmp_path: Path) -> None:
    text = rendered(
        tmp_path, other={"benchmark": "new", "summary": {"decode": {"tok/s": 123.456}, "note": "x|y"}}
    )
    assert "## new: other" in text
    assert "| decode tok/s | 123.5 |" in text
    assert r"| note | x\|y |" in text


def test_what_a_gpu_gave(tmp_path: Path) -> None:
    """Figures that are made up, of a run that did not get to its end."""

    def product(way: str, rows: int, us: float, same: bool = True) -> dict[str, Any]:
        return {
            "shape": [4608, 4096], "way": way, "rows": rows, "us": us, "GB/s": 1e4 / us, "error": 1e-3,
            "same_again": same,
        }  # fmt: skip

    def decoded(precision: str, way: str, tokens: float) -> dict[str, Any]:
        return {
            "precision": precision, "way": way, "batch": 1, "prefill_tokens/s": 9e3, "tokens/s": tokens,
            "ms/token": 1.5, "weights_GB/s": 2000.0,
            "resident_MiB": 4000, "peak_allocated_MiB": 5000, "device_used_MiB": None,
        }  # fmt: skip

    products = [
        product("bf16", 1, 20.0), product("int4-g128", 1, 8.0), product("int4-g128", 64, 90.0),
        product("humming int4-g128", 1, 10.0, same=False),
        {"shape": [4608, 4096], "way": "nf4", "failed": "Error: gone"},
    ]  # fmt: skip
    models = [
        decoded("bf16", "graph", 200.0),
        decoded("int4", "graph", 500.0),
        decoded("int4", "thudm", 50.0),
    ]
    copies = [{"what": "the GPU", "name": "Imagined"}, {"what": "device to device", "GB/s": 4000.0}]
    text = rendered(tmp_path, gpu={
        "benchmark": "gpu", "tests_status": 124, "bandwidth": {"seconds": 1, "results": copies},
        "matmul": {"seconds": 9, "results": products},
        "end_to_end": {"seconds": 9, "results": models, "failed": "some\nlines\nstopped after 9 seconds"},
        "convert": {"seconds": 0, "results": [], "failed": "there was no time left"},
    })  # fmt: skip
    assert "Tests on the GPU: FAILED (124)" in text
    assert "| int4-g128 | 8.0 | 90.0 | 1250 | 1.0e-03 | yes |" in text
    assert "| humming int4-g128 | 10.0 |  | 1000 | 1.0e-03 | no |" in text
    assert "Not measured: [4608, 4096], nf4: Error: gone" in text
    assert "| int4 | graph | 1 | 9000 | 500.0 | 1.500 | 2000 | 4000 | 5000 |  |" in text
    assert "The section end_to_end is not complete: stopped after 9 seconds" in text
    assert "The section convert is not complete: there was no time left" in text
    assert "| int4, batch 1: weights read / copy bandwidth | 0.50 |" in text
    assert "| int4 / bf16, tokens/s at batch 1 | 2.50 |" in text
    assert "| int4 product / humming int4-g128, time, 1 to 16 rows, the worst | 0.80 |" in text
