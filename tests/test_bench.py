"""`glmquant bench`: every runtime on small models, failures as rows, and what is made of the figures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_models import expected
from helpers_sources import CHATGLM2, random_tensors, write_model

import glmquant
from glmquant import Recipe, UsageError
from glmquant.bench import harness, report
from glmquant.bench.cases import Candidate, Result, Trial, Workload
from glmquant.bench.runtimes import RUNTIMES
from glmquant.bench.worker import measure
from glmquant.cli import main
from glmquant.cli.bench import PEERS
from glmquant.ops import decoding_native

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


@pytest.mark.parametrize(
    ("runtime", "install"), [("torchao-int8", "torchao"), ("bitsandbytes-nf4", "'glmquant[bnb]'")]
)
def test_a_peer_that_is_not_installed(
    models: dict[str, Path], runtime: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = runtime.partition("-")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(package), *sys.meta_path])
    with pytest.raises(UsageError, match=rf"^needs {package}: pip install {re.escape(install)}$"):
        RUNTIMES[runtime](Candidate(str(models["source"]), device="cpu", dtype="float32"))


class _Absent:
    """An import hook that finds a package nowhere."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


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
    assert lines[3].startswith("8 tokens of prompt, 3 new;")
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
        "a", "glmquant", "float32", "2", "1.2", "3.00", "4.00", "-", "0.5 (0.25-1)", "400 (200-800)", "20 (10-40)"
    )  # fmt: skip
    assert bad == ("b|c", "16bit", "no such weights")


def test_markdown(made: dict[str, Any]) -> None:
    lines = report.markdown(made).splitlines()
    assert lines[1] == "|---|---|" + "---:|" * 9
    assert lines[3].startswith(r"| b\|c | 16bit | failed: no such weights |")
    assert {line.replace(r"\|", "").count("|") for line in lines[:4]} == {12}
    assert "An Abacus, 2 cores; torch 2.13.0" in lines[-1]


def test_plot(made: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(made, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(glmquant.UsageError, match="cannot be written"):
        report.plot(made, tmp_path / "out.abc")
    with pytest.raises(glmquant.UsageError, match="nothing to plot"):
        report.plot({**made, "results": made["results"][1:]}, tmp_path / "none.png")


def test_memory_is_predicted_beside_what_was_measured(models: dict[str, Path]) -> None:
    candidates = [
        Candidate(str(models["int4"]), runtime, "cpu") for runtime in ("glmquant", "16bit", "dequantize")
    ]
    found = harness.run(candidates, WORKLOAD)
    ours, plain, other = report.parse(found)[1]
    assert other.predicted is None  # nothing here knows what it takes
    for result in (ours, plain):
        assert result.predicted is not None
        # 8 tokens of prompt and 3 that were read after them, for 3 sequences: exact, or with the decode loop's room
        columns = 11 if decoding_native.why_not() else 256
        assert result.predicted["cache"] == result.memory["cache"] == 3 * columns * _cache_of_a_token(models)
        resident = sum(result.predicted[term] for term in ("weights", "scales", "rest"))
        assert resident == pytest.approx(result.weight_bytes, abs=1024)  # rotary frequencies
    header, *rows = report.memory_table(found)
    assert [row[1] for row in rows] == ["glmquant", "16bit"]
    assert {len(row) for row in rows} == {len(header)} == {8}
    both = report.terms(ours)
    assert both is not None
    assert sum(both[0].values()) == ours.predicted["peak"]  # type: ignore[index]
    assert sum(both[1].values()) == ours.memory["process"]
    assert "memory, predicted / measured GiB" in report.text(found)


def _cache_of_a_token(models: dict[str, Path]) -> int:
    config = json.loads((models["source"] / "config.json").read_text())
    heads = config["multi_query_group_num"] * config["kv_channels"]
    return 2 * config["num_layers"] * heads * 2


def test_columns_of_a_gpu(made: dict[str, Any]) -> None:
    result = made["results"][0]
    result["device"] = "cuda:0"
    result["memory"] = {
        "allocated": 3 << 30,
        "reserved": 4 << 30,
        "process": 5 << 30,
        "base": 1 << 29,
        "cache": 1 << 28,
    }
    result["predicted"] = {
        "weights": 2 << 30, "scales": 0, "rest": 1 << 29, "cache": 1 << 28, "process_base": 1 << 29,
        "allocated": 3 << 30, "peak": 11 << 29,
    }  # fmt: skip
    header, good, _ = report.table(made)
    assert header[6:11] == ("allocated GiB", "predicted", "reserved GiB", "process GiB", "predicted")
    assert good[6:11] == ("3.00", "3.00", "4.00", "5.00", "5.50")
    assert report.memory_table(made)[1][-2:] == ("5.500 / 5.000", "+10.0 %")


def small_gguf(path: Path) -> Path:
    """Random weights as a Llama of two layers, with a vocabulary of 128 pieces."""
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    hidden, ffn, vocab = 64, 128, 128
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"piece{n}" for n in range(3, vocab))])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[1] * (vocab - 3)])
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,), "output": (vocab, hidden)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (32, hidden), "attn_v": (32, hidden),
                "attn_output": (hidden, hidden), "ffn_norm": (hidden,), "ffn_gate": (ffn, hidden),
                "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        values = torch.randn(*shape, generator=generator) * 0.1
        writer.add_tensor(f"{name}.weight", values.half().numpy() if len(shape) == 2 else values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = small_gguf(tmp_path / "model.gguf")
    found = harness.run([Candidate(str(tmp_path), "llama.cpp", "cpu")], WORKLOAD)
    (result,) = report.parse(found)[1]
    assert result.error is None, result.error
    assert [trial.batch for trial in result.trials] == [1, 1, 3, 3]
    assert all(trial.first_token_seconds > 0 and trial.decode_seconds > 0 for trial in result.trials)
    assert (result.dtype, result.weight_bytes) == ("GGUF", file.stat().st_size)
    assert result.memory["process"] > result.memory["base"]


def test_what_llama_cpp_cannot_run_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    found = harness.run([Candidate(str(tmp_path / "broken.gguf"), "llama.cpp", "cpu")], WORKLOAD)
    said = found["results"][0]["error"]
    assert "llama.cpp does not load" in said or "pip install xllamacpp" in said


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
