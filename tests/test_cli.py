"""The command line: what it prints where, its exit statuses, and how light it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers_convert import content, flip_byte, run_cli, small_source, stored_tensors
from safetensors.torch import save_file

from glmquant import cli
from glmquant.checkpoint.output import REPORT

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "out"
    assert CliRunner().invoke(cli.main, ["convert", str(source), str(out), "--method", "rtn"]).exit_code == 0
    return out


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """A copy of the converted folder, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in content(converted).items():
        (folder / name).write_bytes(data)
    return folder


def the_json(result: Result) -> Any:
    """What was printed, which is one JSON document and nothing else."""
    assert result.stderr == ""
    assert result.stdout.endswith("}\n")
    return json.loads(result.stdout)


def the_error(result: Result, status: int = 2) -> str:
    """The one sentence that went to stderr."""
    assert result.exit_code == status
    assert result.stdout == ""
    assert re.fullmatch(r"glmquant: [^\n]+[.?)]\n", result.stderr), result.stderr
    return result.stderr.removeprefix("glmquant: ").strip()


# Help


@pytest.mark.parametrize("command", ["", *cli.main.commands])
def test_help(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Usage: ")
    examples = [line for line in lines if line.startswith("  glmquant ")]
    assert len(examples) >= 2  # each on a line of its own
    assert all(line.count("glmquant ") == 1 for line in examples)
    assert run(*command.split(), "-h").stdout == result.stdout
    undescribed = [line for line in lines if re.fullmatch(r"  --[a-z-]+", line)]
    assert undescribed == []


def test_version(run: Run) -> None:
    result = run("--version")
    assert re.fullmatch(r"glmquant, version \d+\.\d+\.\S+\n", result.stdout)


# Happy paths


def test_inspect(run: Run, source: Path, converted: Path) -> None:
    result = run("inspect", source)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "chatglm2, original layout" in result.stdout
    assert re.search(r"^layers +2 x 128, 4 heads \(2 KV\) of 32, MLP 256$", result.stdout, re.M)
    assert re.search(r"^quantization +none$", result.stdout, re.M)
    result = run("inspect", converted)
    assert re.search(r"^quantization +int4 g128 \(12 weights\)$", result.stdout, re.M)
    assert "glm, native layout" in result.stdout


def test_inspect_json(run: Run, source: Path, converted: Path) -> None:
    found, made = the_json(run("inspect", source, "--json")), the_json(run("inspect", converted, "--json"))
    elements = sum(tensor.numel() for tensor in stored_tensors(source).values())
    assert found["parameters"] == made["parameters"] == elements
    assert found["bytes"] == 2 * elements == found["dtypes"]["F16"]
    assert made["bytes"] == sum(t.numel() * t.element_size() for t in stored_tensors(converted).values())
    assert made["schemes"] == {"int4 g128": 12}
    # 2 (K and V) * 2 layers * 2 heads * 32 * 256 tokens * 2 bytes
    assert found["kv_cache_bytes"] == {"256": 2 * 2 * 2 * 32 * 256 * 2}


def test_the_help_has_the_default_format(run: Run) -> None:
    shown = " ".join(run("convert", "--help").stdout.split())
    assert "[default: compressed-tensors; cpm for ChatGLM-6B; safetensors with --bits 16]" in shown


def test_convert(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", source, out)
    assert result.exit_code == 0
    report = json.loads((out / REPORT).read_text())
    assert re.search(rf"^written +{out}$", result.stdout, re.M)
    assert re.search("^format +compressed-tensors, native layout$", result.stdout, re.M)
    summary = report["summary"]
    assert f"{summary['bits_per_weight']} bits per weight" in result.stdout
    assert f"{summary['worst_relative_error']:.4f} worst ({summary['worst_tensor']})" in result.stdout
    assert result.stdout.startswith("note: transformers unpacks")
    # Not a terminal: a line for every tenth of the way.
    lines = result.stderr.splitlines()
    assert all(re.fullmatch(r"converting: {1,3}\d+ % of \d\.\d\d MiB \([\w.]+\)", line) for line in lines)
    assert 5 <= len(lines) <= 11
    assert lines[-1].startswith("converting: 100 %")


def test_convert_json(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = the_json(run("convert", source, out, "--json", "--bits", "8", "--layout", "original"))
    assert printed.pop("out") == str(out)
    assert printed == json.loads((out / REPORT).read_text())
    assert (printed["recipe"]["bits"], printed["recipe"]["layout"]) == (8, "original")


def test_convert_16_bit(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "out", "--bits", "16")
    assert result.exit_code == 0
    assert "1.00 times smaller, 16" in result.stdout
    assert "error" not in result.stdout


OPTIONS = {
    "--group-size 32": {"group_size": 32},
    "--group-size row": {"group_size": "row"},
    "--asymmetric": {"symmetric": False},
    "--method rtn": {"method": "rtn"},
    "--format cpm": {"format": "cpm", "method": "thudm", "group_size": "row", "layout": "original"},
    "--quantize-head": {"quantize_head": True},
    "--quantize-embeddings": {"quantize_embeddings": True},
    "--max-shard-size 3.5GiB": {"max_shard_size": 3_758_096_384},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_reach_the_recipe(run: Run, source: Path, tmp_path: Path, options: str) -> None:
    plan = the_json(run("convert", source, tmp_path / "out", "--dry-run", "--json", *options.split()))
    assert plan["recipe"] == {**plan["recipe"], **OPTIONS[options]}


def test_dry_run(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "out", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    lines = result.stdout.splitlines()
    assert lines[0].endswith("4 bit, mse, compressed-tensors, native layout")
    assert any(
        re.match(r"model\.layers\.0\.mlp\.down_proj\.weight +128 x 256 +F16 +int4 g128 +0\.02$", x)
        for x in lines
    )
    assert any(re.match(r"lm_head\.weight +320 x 128 +F16 +F16 +0\.08$", x) for x in lines)
    assert any(re.match(r"reads \S+ MiB, writes \S+ MiB in 1 files$", line) for line in lines)
    random = ("--method", "gptq", "--calibration", "random", "--dry-run")
    first = run("convert", source, tmp_path / "out", *random).stdout.splitlines()[0]
    assert "4 bit, gptq, calibrated on random tokens, no text, compressed-tensors" in first


def test_dry_run_tells_the_truth(run: Run, source: Path, tmp_path: Path) -> None:
    command = ["convert", source, tmp_path / "out", "--json", "--max-shard-size", "100kB"]
    plan = the_json(run(*command, "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    report = the_json(run(*command))
    assert plan["recipe"] == report["recipe"]
    assert plan["bytes"] == report["summary"]["bytes"]
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert plan["files"] == written
    assert len(written) == 4


def test_adapter_is_passed_on(run: Run, source: Path, tmp_path: Path) -> None:
    for command in (
        ["convert", source, tmp_path / "out"],
        ["convert", source, tmp_path / "out", "--dry-run"],
    ):
        result = run(*command, "--adapter", tmp_path / "nothing")
        assert "--adapter" in the_error(result)
        assert "nothing" in result.stderr


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("500mb", 5 * 10**8),
        ("1.5 kib", 1536),
        (".5MB", 500_000),
        ("2000000", 2_000_000),
    ],
)
def test_sizes(run: Run, source: Path, tmp_path: Path, text: str, size: int) -> None:
    plan = the_json(run("convert", source, tmp_path / "o", "--dry-run", "--json", "--max-shard-size", text))
    assert plan["recipe"]["max_shard_size"] == size


@pytest.mark.parametrize(
    "text", ["rubbish", "4XB", "", "-4GB", "4GB5", "0", "0GB", "1e9", "4,5GB", "GB", "4"]
)
def test_rubbish_sizes(run: Run, source: Path, tmp_path: Path, text: str) -> None:
    result = run("convert", source, tmp_path / "out", f"--max-shard-size={text}")
    assert repr(text) in the_error(result)
    assert list(tmp_path.iterdir()) == []


# Errors


def test_errors_are_one_sentence(run: Run, source: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for command in ("inspect", "verify"):
        assert "nowhere" in the_error(run(command, tmp_path / "nowhere"))
        assert str(tmp_path / "empty") in the_error(run(command, tmp_path / "empty"))
    for how in ([], ["--json"]):
        assert "exists; choose another OUT" in the_error(run("convert", source, converted, *how))
    assert "group size 48" in the_error(run("convert", source, out, "--group-size", "48"))
    assert "use --method mse" in the_error(run("convert", source, out, "--method", "thudm"))
    assert "is inside the source" in the_error(run("convert", source, source / "out"))
    assert not out.exists()


def test_errors_of_parsing(run: Run, source: Path, tmp_path: Path) -> None:
    for wrong in (
        ["--bits", "5"],
        ["--group-size", "many"],
        ["--workers", "0"],
        ["--format", "zip"],
        ["--nonsense"],
    ):
        result = run("convert", source, tmp_path / "out", *wrong)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert re.search(r"\nError: .*" + wrong[0], result.stderr)
    assert run("convert").exit_code == run("nonsense").exit_code == 2


def test_unforeseen_system_errors(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/weights")

    monkeypatch.setattr("glmquant._inspect.inspect", fail)
    assert the_error(run("inspect", source)) == "/secret/weights: Permission denied."


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert re.search(r"\nglmquant: .*nowhere", result.stderr)


# Verify


def test_verify(run: Run, source: Path, converted: Path) -> None:
    result = run("verify", converted, "--source", source)
    assert result.exit_code == 0
    files = len(content(converted)) - 2  # all but the report and the card
    assert re.search(r"^tensors +49, of which 12 quantized weights were decoded$", result.stdout, re.M)
    assert re.search(rf"^hashes +{files} files compared$", result.stdout, re.M)
    assert re.search(r"^verdict +sound$", result.stdout, re.M)
    assert result.stderr.splitlines()[-1] == "verifying: 100 % (lm_head.weight)"


def test_verify_json_measures_the_errors_of_the_report(run: Run, source: Path, converted: Path) -> None:
    found = the_json(run("verify", converted, "--source", source, "--json"))
    tensors = json.loads((converted / REPORT).read_text())["tensors"]
    stated = {name: entry["relative_error"] for name, entry in tensors.items() if entry["scheme"]}
    assert (found["ok"], found["problems"], found["quantized"]) == (True, [], 12)
    assert found["errors"] == pytest.approx(stated, rel=1e-5)


def problems(result: Result) -> list[str]:
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    found = [
        line.removeprefix("problem: ") for line in result.stdout.splitlines() if line.startswith("problem: ")
    ]
    assert re.search(rf"^verdict +{len(found)} problems$", result.stdout, re.M)
    return found


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_verify_finds_a_flipped_byte(run: Run, copy: Path, name: str) -> None:
    flip_byte(copy / name, offset=-100)
    assert f"{name} has changed since it was written (SHA-256 differs)." in problems(run("verify", copy))
    result = run("verify", copy, "--json")
    assert (result.exit_code, the_json(result)["ok"]) == (1, False)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_verify_finds_a_missing_file(run: Run, copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert problems(run("verify", copy)) == [f"{name} is missing."]


def test_verify_names_the_weight_whose_scale_is_nan(run: Run, copy: Path) -> None:
    tensors = stored_tensors(copy)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][3, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    found = problems(run("verify", copy))
    assert "model.layers.1.mlp.down_proj.weight decodes to NaN or infinity in rows 0 to 127." in found


def test_verify_finds_the_wrong_source(run: Run, converted: Path, tmp_path: Path) -> None:
    other = small_source(tmp_path / "other", seed=7)
    result = run("verify", converted, "--source", other)
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert len(lines) == 21  # twenty, and how many more
    assert "is it the checkpoint it was made from?" in lines[0]
    assert len(the_json(run("verify", converted, "--source", other, "--json"))["problems"]) > 20


def test_real_process_exit_statuses(source: Path, copy: Path, tmp_path: Path) -> None:
    assert run_cli("verify", copy, "--json").returncode == 0
    flip_byte(copy / "model.safetensors")
    found = run_cli("verify", copy, "--json")
    assert (found.returncode, found.stderr) == (1, "")
    assert not json.loads(found.stdout)["ok"]
    missing = run_cli("convert", tmp_path / "nowhere", tmp_path / "out")
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (2, "", 1)
    assert missing.stderr.startswith("glmquant: ")
