"""``glmquant recipes`` and ``glmquant check`` on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result
from helpers_convert import glmquant_on_path, run_script, small_source

import glmquant
from glmquant import Recipe, cli, convert

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("out") / "out", Recipe(method="rtn")).out


@pytest.fixture
def run() -> Run:
    return lambda *args: CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_recipes_state_what_convert_writes(run: Run, source: Path, tmp_path: Path) -> None:
    result = run("recipes", source, "--context", "256", "--vram", "6GB", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["vram"] == 6 * 10**9
    rows = found["recipes"]
    assert [row["file_bytes"] for row in rows] == sorted(row["file_bytes"] for row in rows)
    assert len(rows) == 30
    for number, row in enumerate(rows):
        recipe = {key: row["recipe"][key] for key in ("bits", "group_size", "symmetric", "format")}
        recipe["activations"] = row["recipe"].get("activations")
        written = convert(source, tmp_path / str(number), Recipe(**recipe)).out
        assert row["file_bytes"] == sum(
            path.stat().st_size for path in written.glob("model*.[sg]*") if path.suffix != ".json"
        )
        assert (row["fits"], row["longest_context"]) == (True, 256)


def test_recipes_table(run: Run, source: Path) -> None:
    result = run("recipes", source, "--context", "256", "--vram", "1GiB", "--runtime", "transformers")
    assert result.exit_code == 0, result.output
    assert re.search(r"^compressed-tensors int4 g32 asym +\d\.\d\d MiB +\d+\.\d\d +-", result.stdout, re.M)
    assert "note: cpm int4 row: transformers does not read cpm." in result.stdout
    assert "note: plain transformers unpacks" in result.stdout


def test_recipes_with_a_quantized_head(run: Run, source: Path) -> None:
    """Where a format has that; a size that is smaller by half the head, less its scales."""
    options = ("recipes", source, "--context", "256", "--json")
    plain, ends = (
        {row["name"]: row for row in json.loads(run(*options, *more).stdout)["recipes"]}
        for more in ([], ["--quantize-head"])
    )
    assert ends["compressed-tensors int4 g128, head int8"]["recipe"]["quantize_head"] is True
    head = 320 * 128
    saved = (
        plain["compressed-tensors int4 g128"]["file_bytes"]
        - ends["compressed-tensors int4 g128, head int8"]["file_bytes"]
    )
    assert 0.8 * head < saved < head
    assert "cpm int4 row" in ends  # which has none
    assert "safetensors 16 bit" in ends
    assert len(plain) == len(ends)


def test_recipes_say_which_groups_sharded_widths_admit(run: Run, source: Path) -> None:
    result = run("recipes", source, "--context", "256", "--tp", "2")
    assert result.exit_code == 0, result.output
    assert "group 128 does not divide 128 / 2 columns; groups that do: 32, 64." in result.stdout
    assert "note: figures for vllm are approximate." in result.stdout
    assert (
        "--runtime vllm"
        in run("recipes", source, "--context", "256", "--tp", "2", "--runtime", "glmquant").stderr
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "0"], "--context 0 makes no sense"),
        (["--batch", "-1", "--context", "64"], "--batch -1 makes no sense"),
        (["--context", "257"], "beyond the 256 tokens"),
        (["--context", "64", "--vram", "0GB"], "must be positive"),
        (["--context", "64", "--vram", "six"], "not a size"),
    ],
)
def test_recipes_refuse(run: Run, source: Path, options: list[str], said: str) -> None:
    result = run("recipes", source, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_check_is_a_gate(run: Run, out: Path, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    options = ["check", out, "--context", "128", "--max-file-size", "1MB", "--junit", junit]
    good, bad = run(*options, "--vram", "2GiB"), run(*options, "--vram", "2MiB")
    assert good.exit_code == 0, good.output
    assert "ok: VRAM, predicted:" in good.stdout
    assert bad.exit_code == 1
    assert "FAILED: VRAM, predicted:" in bad.stdout
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["tests"] == "2"
    assert [len(case) for case in suite] == [1, 0]
    shown = json.loads(run(*options, "--vram", "2MiB", "--json").stdout)
    assert (shown["ok"], [gate["ok"] for gate in shown["gates"]]) == (False, [False, True])
    terms = shown["predicted"]
    assert terms["allocated"] == sum(
        terms[key] for key in ("weights", "scales", "rest", "cache", "activations", "workspace")
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --vram"),
        (["--vram", "-2GB"], "not a size"),
        (["--vram", "0GB"], "must be positive"),
        (["--vram", "2GB", "--context", "1000"], "beyond the 256 tokens"),
    ],
)
def test_check_refuses(run: Run, out: Path, options: list[str], said: str) -> None:
    result = run("check", out, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml", "check.sh"])
def test_the_pipelines_in_the_documentation_work(name: str, source: Path, tmp_path: Path) -> None:
    """What a runner would execute is executed, but for installing: with a context that the small model has."""
    file = Path(__file__).parent.parent / "docs/ci" / name
    script, places = file.read_text(), {}
    if name == "github.yml":
        (job,) = yaml.safe_load(script)["jobs"].values()
        script = "\n".join(step["run"] for step in job["steps"] if "run" in step)
    elif name == "gitlab.yml":
        (job,) = yaml.safe_load(script).values()
        script = "\n".join(job["script"])
        assert job["artifacts"]["reports"]["junit"] in script
    if name != "check.sh":
        named = job.get("env", job.get("variables"))
        assert named.keys() == {"MODEL", "OUT", "GLMQUANT"}
        assert 'pip install "$GLMQUANT"' in script  # no index has a package of that name
        assert named["GLMQUANT"].startswith(("./", "git+"))
    places = {"MODEL": str(source), "OUT": "out", "PATH": glmquant_on_path(tmp_path / "bin")}
    script = re.sub(r"^pip install .*$", "", script, flags=re.M).replace("--context 2048", "--context 128")
    done = run_script(script, tmp_path, places)
    assert done.returncode == 0, done.stderr
    assert glmquant.verify(tmp_path / "out").ok
    assert (tmp_path / "check.xml").exists() == ("--junit" in script)
    refused = run_script(script.replace("6GiB --context", "2MiB --context"), tmp_path / "bin", places)
    assert refused.returncode == 1
