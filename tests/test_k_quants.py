"""K-quants: what llama.cpp's own ``llama-quantize`` makes of our F16 file, and what is done when it cannot.

Most tests have a program in its place that speaks its command line and encodes with the package gguf, which knows the
32-wide blocks that llama-quantize falls back to. The last one asks the real program where there is one.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers_convert import partial_of
from helpers_formats import load_json, write_chatglm2
from test_native_load import IDS

import glmquant
from glmquant import QuantizationError, Recipe, UsageError, VerificationError
from glmquant.checkpoint.source import open_folder
from glmquant.cli import main
from glmquant.formats.k_quants import PROGRAM, llama_quantize

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

K = Recipe(bits=16, format="gguf", k_quant="q4_k_m")
EMBEDDING = "transformer.embedding.word_embeddings.weight"
HEAD = "transformer.output_layer.weight"
DOWN = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"

STAND_IN = """#!{python}
import sys
import gguf, numpy
print("main: build = 1234 (abcdef0)")
plain, fresh, kind, threads = sys.argv[1:]
assert kind == "Q4_K_M" and int(threads) >= 1
types = gguf.GGMLQuantizationType
writer = gguf.GGUFWriter(fresh, "chatglm")
for tensor in gguf.GGUFReader(plain).tensors:
    data, stored = tensor.data, types.F32
    if data.ndim == 2:
        stored = types.Q8_0 if tensor.name == "output.weight" else types.Q5_0
        data = gguf.quantize(data.astype(numpy.float32), stored)
    {damage}
    writer.add_tensor(tensor.name, data, raw_dtype=stored)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
{ending}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_chatglm2(tmp_path / "model")
    return tmp_path / "model"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str = "", ending: str = "") -> Path:
    """Have a program that does the work of llama-quantize, or fails to."""
    program = folder / "llama-quantize"
    program.write_text(STAND_IN.format(python=sys.executable, damage=damage, ending=ending))
    program.chmod(0o755)
    monkeypatch.setenv(PROGRAM, str(program))
    return program


def test_a_k_quant_is_verified_described_run_and_converted_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    out = tmp_path / "out"
    glmquant.convert(source, out, K)
    stored = {t.name: t for t in gguf.GGUFReader(out / "model.gguf").tensors}
    theirs = stored["blk.1.ffn_down.weight"]
    assert theirs.tensor_type.name == "Q5_0"
    values = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type))
    found = open_folder(out)
    assert torch.equal(found.read(DOWN), values)
    assert torch.equal(found.read(DOWN, 3, 5), values[3:5])

    report = load_json(out / "quantization_report.json")
    assert report["requantized"] == "llama-quantize, build 1234 (abcdef0)"
    assert report["recipe"]["k_quant"] == "q4_k_m"
    assert report["files"]["model.gguf"]["bytes"] == (out / "model.gguf").stat().st_size
    assert report["summary"]["bytes"] == (out / "model.gguf").stat().st_size
    assert {report["tensors"][name]["scheme"] for name in (DOWN, EMBEDDING)} == {"Q5_0"}
    exact = open_folder(source).read(DOWN).float()
    error = ((values - exact).norm() / exact.norm()).item()
    assert report["tensors"][DOWN]["relative_error"] == pytest.approx(error, rel=1e-4)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {*report["files"], "README.md", "quantization_report.json"}
    )
    verdict = glmquant.verify(out, source=source)
    assert verdict.ok, verdict.problems
    assert verdict.quantized == 2 + 4 * 2
    assert verdict.errors[DOWN] == pytest.approx(error, rel=1e-4)

    described = glmquant.inspect(out)
    assert described.schemes == {"Q5_0": 9, "Q8_0": 1}
    assert described.nbytes < (out / "model.gguf").stat().st_size
    card = (out / "README.md").read_text()
    assert "Q4_K_M by llama.cpp (Q5_0 x 9, Q8_0 x 1)" in card
    assert "glmquant convert HuggingFaceTB" not in card
    assert "OUT --gguf-type q4_k_m" in card

    again = glmquant.convert(out, tmp_path / "wide", Recipe(bits=16, layout="native"))
    (note,) = (note for note in again.plan.notes if "quantized by llama.cpp" in note)
    assert "10 weights (9 in Q5_0, 1 in Q8_0)" in note
    assert "quantization_config" not in load_json(tmp_path / "wide" / "config.json")
    with torch.inference_mode():
        logits = [
            glmquant.load(folder, device="cpu", dtype=torch.float32)(IDS).logits
            for folder in (out, tmp_path / "wide")
        ]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 2e-3  # rounded once more, to half


def test_a_changed_byte_in_a_k_quant_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    glmquant.convert(source, tmp_path / "out", K)
    (tensor,) = (
        t for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if t.name == "blk.1.ffn_down.weight"
    )
    with (tmp_path / "out/model.gguf").open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(b"\x00\x7c")  # the first scale is infinity
    problems = glmquant.verify(tmp_path / "out").problems
    assert any("SHA-256 differs" in problem for problem in problems)
    assert any(f"{DOWN} decodes to NaN or infinity" in problem for problem in problems)


@pytest.mark.parametrize(
    ("damage", "ending", "error", "said"),
    [
        ("", "print('not enough memory'); sys.exit(1)", QuantizationError, "status 1 .*: not enough memory"),
        ("sys.exit(0)", "", QuantizationError, "status 0 and wrote no q4_k_m"),
        ("data = data[::-1].copy()", "", VerificationError, "is not the weight it was given"),
        ("data, stored = tensor.data, None", "", VerificationError, "in which nothing is quantized"),
        ("if 'norm' in tensor.name: data = data * 1.01", "", VerificationError, "changed transformer"),
        ("if tensor.name == 'output.weight': continue", "", VerificationError, "other tensors"),
    ],
    ids=["fails", "silent", "scrambled", "nothing-done", "norms-changed", "tensor-lost"],
)  # fmt: skip
def test_what_goes_wrong_leaves_no_model_and_can_be_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, ending: str,
    error: type[Exception], said: str,
) -> None:  # fmt: skip
    stand_in(tmp_path, monkeypatch, damage, ending)
    with pytest.raises(error, match=said):
        glmquant.convert(source, tmp_path / "out", K)
    assert not (tmp_path / "out").exists()
    assert not list(partial_of(tmp_path / "out").glob("q4*"))
    stand_in(tmp_path, monkeypatch)
    written = partial_of(tmp_path / "out") / "model.gguf"
    before = written.stat().st_mtime_ns, written.stat().st_ino
    glmquant.convert(source, tmp_path / "out", K, resume=True)
    assert (tmp_path / "out/model.gguf").stat().st_ino != before[1]
    assert glmquant.verify(tmp_path / "out", source=source).ok


def test_without_the_program_nothing_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROGRAM, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["convert", str(source), str(tmp_path / "out"), "--gguf-type", "q4_k_m"]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "llama-quantize, which is not on PATH" in result.output
    assert not list(tmp_path.glob("out*"))
    glmquant.convert(source, tmp_path / "out", Recipe(format="gguf"))  # the rest does without it

    program = tmp_path / "llama-quantize"
    program.write_text("no program")
    program.chmod(0o755)
    with pytest.raises(QuantizationError, match="cannot be run"):
        glmquant.convert(source, tmp_path / "k", K)
    monkeypatch.setenv(PROGRAM, str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="which is no program that can be run"):
        glmquant.plan_conversion(source, K)


def test_only_a_plain_gguf_file_becomes_a_k_quant(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    for recipe in (
        Recipe(bits=4, format="gguf", k_quant="q4_k_m"),
        Recipe(bits=16, k_quant="q4_k_m"),
        Recipe(bits=16, format="gguf", k_quant="q4_0"),
    ):
        with pytest.raises(UsageError, match=r"made of a GGUF file in 16 bit|is not asked for 'q4_0'"):
            glmquant.plan_conversion(source, recipe)
    with pytest.raises(UsageError, match="decides about every weight of q4_k_m; leave out --method"):
        glmquant.plan_conversion(source, replace(K, quantize_head=True))


@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_the_real_program(tmp_path: Path, kind: str) -> None:
    try:
        llama_quantize(kind)
    except UsageError as error:
        pytest.skip(str(error))
    write_chatglm2(tmp_path / "model", hidden_size=256, ffn_hidden_size=256, kv_channels=64)
    out = tmp_path / "out"
    glmquant.convert(tmp_path / "model", out, Recipe(bits=16, format="gguf", k_quant=kind))
    types = glmquant.inspect(out).schemes
    assert kind[:4].upper() in types
    assert glmquant.verify(out, source=tmp_path / "model").ok
    errors = [e["relative_error"] for e in load_json(out / "quantization_report.json")["tensors"].values()
              if e["scheme"]]  # fmt: skip
    assert max(errors) < (0.1 if kind == "q4_k_m" else 0.03)
    glmquant.convert(out, tmp_path / "wide", Recipe(bits=16, layout="native"))
    with torch.inference_mode():
        found, expected = (
            glmquant.load(folder, device="cpu", dtype=torch.float32)(IDS).logits
            for folder in (out, tmp_path / "wide")
        )
    assert (found - expected).norm() / expected.norm() < 2e-3


def test_the_real_program_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = stand_in(tmp_path, monkeypatch)
    monkeypatch.delenv(PROGRAM)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert llama_quantize("q5_k_s") == str(program) == shutil.which("llama-quantize")
