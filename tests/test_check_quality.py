"""``glmquant check --max-kld``: the divergence from the source as a gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from helpers_convert import glmquant_on_path, run_script
from helpers_sources import CHATGLM2, random_tensors, write_model
from test_evaluate import TEXT, opinionated
from test_original_tokenizers_tiny import sentencepiece_folder

import glmquant
from glmquant import Recipe, cli

Run = Callable[..., Result]
CONFIG = {**CHATGLM2, "padded_vocab_size": 512}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sentencepiece_folder(tmp_path_factory.mktemp("models") / "source", "chatglm3-6b")
    return write_model(folder, CONFIG, opinionated(CONFIG))


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    return glmquant.convert(source, source.parent / "out", Recipe(method="rtn")).out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run() -> Run:
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_the_divergence_is_a_gate(run: Run, source: Path, out: Path, text: Path, tmp_path: Path) -> None:
    window = min(512, glmquant.inspect(source).dims.context)
    found = glmquant.evaluate(out, source, text, window=window, device="cpu")
    junit = tmp_path / "check.xml"
    options = ["check", out, "--reference", source, "--text", text, "--device", "cpu", "--junit", junit]
    value = found.kl_mean.value
    good = run(*options, "--max-kld", 1.01 * value, "--json")
    assert good.exit_code == 0, good.output
    shown = json.loads(good.stdout)
    assert shown["gates"] == [
        {"name": "KL divergence", "found": value, "limit": 1.01 * value, "unit": "nats", "ok": True}
    ]
    assert shown["evaluation"] == {**found.to_json(), "source": str(source), "out": str(out)}
    bad = run(*options, "--max-kld", 0.99 * value, "--vram", "4GiB", "--context", "64")
    assert bad.exit_code == 1
    assert "ok: memory, predicted:" in bad.stdout
    assert re.search(r"FAILED: KL divergence: [\d.e-]+ nats exceeds [\d.e-]+$", bad.stdout, re.M)
    assert re.search(
        r"^KL divergence +[\d.e-]+ nats  ± .* windows of \d+ tokens, .*text.txt$", bad.stdout, re.M
    )
    assert [len(case) for case in ElementTree.parse(junit).getroot()] == [0, 1]


def test_a_model_is_no_way_from_itself(run: Run, source: Path, text: Path) -> None:
    done = run("check", source, "--max-kld", 0, "--reference", source, "--text", text, "--device", "cpu")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-kld", "0.1"], "give --reference SRC"),
        (["--reference", "x"], "what --max-kld X is held against"),
        (["--vram", "1GiB", "--text", "x"], "what --max-kld X is held against"),
        (["--max-kld", "-0.1", "--reference", "x"], "--max-kld -0.1 makes no sense"),
        (["--max-kld", "nan", "--reference", "x"], "--max-kld nan makes no sense"),
        (["--max-kld", "0.1", "--reference", "nowhere"], "nowhere"),
        (["--vram", "1GiB", "--junit", "nowhere/check.xml"], "its folder does not exist"),
    ],
)
def test_options_that_make_no_sense(run: Run, out: Path, options: list[str], said: str) -> None:
    done = run("check", out, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_text_shorter_than_a_window(run: Run, source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:50])
    options = ["--max-kld", 1, "--reference", source, "--text", tmp_path / "short.txt", "--device", "cpu"]
    done = run("check", out, *options)
    assert done.exit_code == 2
    assert "one window needs" in done.stderr


def test_nan_is_a_fault_of_the_model(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "broken", "chatglm3-6b")
    tensors = random_tensors(CONFIG)
    tensors["transformer.output_layer.weight"][-1] = torch.nan
    write_model(folder, CONFIG, tensors)
    junit = tmp_path / "check.xml"
    options = ["--max-kld", 1, "--reference", source, "--text", text, "--device", "cpu", "--junit", junit]
    done = run("check", folder, *options)
    assert done.exit_code == 1, done.output
    assert re.search(r"^FAILED: KL divergence: .*broken is at fault: the head gives NaN", done.stdout, re.M)
    assert [len(case) for case in ElementTree.parse(junit).getroot()] == [1]
    assert json.loads(run("check", folder, *options, "--json").stdout)["gates"][0]["found"] is None


def test_the_gate_in_the_documentation_works(source: Path, text: Path, tmp_path: Path) -> None:
    script = (Path(__file__).parent.parent / "docs/ci/quality.sh").read_text()
    assert "--max-kld" in script
    places = {
        "MODEL": str(source),
        "OUT": "out",
        "TEXT": str(text),
        "PATH": glmquant_on_path(tmp_path / "bin"),
    }
    for limit, status in (("100", 0), ("0.0000001", 1)):
        gate = re.sub(r"--max-kld \S+", f"--max-kld {limit} --device cpu", script)
        done = run_script(gate, tmp_path, places)
        assert done.returncode == status, done.stderr
        assert (tmp_path / "quality.xml").exists()
