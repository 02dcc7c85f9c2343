"""The model card: what it says, that it says nothing else, and that an edited one is left alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers_convert import run_cli, small_source
from helpers_sources import CHATGLM, random_tensors, write_model
from huggingface_hub import ModelCard

import glmquant
from glmquant import OutputError, Recipe, cli, plan_conversion
from glmquant._card import folder_card, written_by_us
from glmquant.checkpoint.output import CARD, EVALUATION, REPORT
from glmquant.memory import Model, Workload, estimate
from glmquant.recipe import Fit


def source_of(root: Path, readme: str | None = None, *licences: str, **fields: Any) -> Path:
    folder = small_source(root / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    for name in licences:
        (folder / name).write_text("terms")
    return folder


def front(card: str | bytes | Path) -> dict[str, Any]:
    """The front matter, as the hub's own library reads it."""
    text = card.read_text() if isinstance(card, Path) else card.decode() if isinstance(card, bytes) else card
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def card_of(tmp_path: Path, source: Path, recipe: Recipe | None = None) -> tuple[dict[str, Any], str]:
    glmquant.convert(source, tmp_path / "out", recipe or Recipe(method="rtn"))
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    return front(text), text


GLM4 = """---
license: other
license_name: glm-4
license_link: https://huggingface.co/THUDM/glm-4-9b-chat/blob/main/LICENSE
language:
- zh
- en
tags:
- thudm
---

# GLM-4
"""
OTHER = {"license": "other"}


def test_what_hubs_index(tmp_path: Path) -> None:
    card_of(tmp_path, source_of(tmp_path, GLM4, "LICENSE"))
    text = published_card(tmp_path / "out", repository="hf:THUDM/glm-4-9b-chat")
    data = front(text)
    assert {
        key: data[key] for key in ("base_model", "base_model_relation", "library_name", "pipeline_tag")
    } == {
        "base_model": "THUDM/glm-4-9b-chat",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert (data["license"], data["license_name"]) == ("other", "glm-4")
    assert data["license_link"] == "https://huggingface.co/THUDM/glm-4-9b-chat/blob/main/LICENSE"
    assert data["language"] == ["zh", "en"]
    assert {"glmquant", "int4", "4-bit", "quantized", "compressed-tensors"} <= set(data["tags"])
    assert "thudm" not in data["tags"]
    assert "`glm-4`" in text
    assert "[LICENSE](LICENSE)" in text


def published_card(out: Path, hub: str | None = None, **source: str) -> str:
    """The card of a folder as if its source had been another one."""
    report = json.loads((out / REPORT).read_text())
    report["source"].update(source)
    (out / REPORT).write_text(json.dumps(report))
    return folder_card(out, hub, "me/model" if hub else None).decode()


def test_a_base_is_stated_only_where_it_is_known(tmp_path: Path) -> None:
    """Fine-tunes keep the name of their base in config.json; pages of one hub are not those of the other."""
    data, text = card_of(tmp_path, source_of(tmp_path, _name_or_path="THUDM/chatglm3-6b"))
    assert not {"base_model", "base_model_relation"} & data.keys()
    assert "the config.json of its source names `THUDM/chatglm3-6b`" in text
    assert "that of THUDM" not in text
    assert "glmquant convert SOURCE OUT --bits 4" in text  # that name may not be what was converted
    assert "`SOURCE`: the folder whose files have the hashes below." in text
    text = published_card(tmp_path / "out", "ms", repository="hf:me/tuned")
    assert not {"base_model", "base_model_relation"} & front(text).keys()
    assert "modelscope.cn/models/me/tuned" not in text
    assert "`hf:me/tuned`" in text
    assert front(published_card(tmp_path / "out", "hf"))["base_model"] == "me/tuned"
    text = published_card(tmp_path / "out", commit="0123abcd")
    assert "glmquant convert hf:me/tuned@0123abcd OUT" in text
    assert "SOURCE" not in text


@pytest.mark.parametrize(
    ("recipe", "said", "option"),
    [
        (Recipe(bits=8, activations=8), "INT8 weights, one scale per row, activations rounded to 8 bit", "--bits w8a8"),
        (Recipe(format="gptq", gptq_version=2, method="rtn"), "INT4, groups of 128", "--gptq-version 2"),
        (Recipe(format="bitsandbytes"), "NF4, groups of 64", "--format bitsandbytes"),
        (Recipe(format="bitsandbytes", double_quant=True), "NF4, groups of 64, scales quantized too", "--double-quant"),
        (Recipe(method="rtn", max_shard_size=700_000), "INT4", "--max-shard-size 700000B"),
    ],
    ids=["w8a8", "gptq-2", "nf4", "double-quant", "shards"],
)  # fmt: skip
def test_the_command_has_every_option(tmp_path: Path, recipe: Recipe, said: str, option: str) -> None:
    if recipe.format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    source = source_of(tmp_path)
    data, text = card_of(tmp_path, source, recipe)
    assert said in text
    assert option in text
    assert ("int4" in data["tags"]) == said.startswith("INT4")
    (line,) = [line for line in text.splitlines() if line.startswith("glmquant convert SOURCE OUT")]
    command = line.replace("SOURCE", str(source)).replace("OUT", str(tmp_path / "again")).split()[1:]
    assert run_cli(*command).returncode == 0
    assert (tmp_path / "again" / REPORT).read_bytes() == (tmp_path / "out" / REPORT).read_bytes()


def test_the_command_names_the_calibration(tmp_path: Path) -> None:
    card_of(tmp_path, source_of(tmp_path))
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    report["recipe"] |= {
        "method": "gptq",
        "calibration": {"text": "my text.txt", "windows": 9, "window": 512},
    }
    (tmp_path / "out" / REPORT).write_text(json.dumps(report))
    text = folder_card(tmp_path / "out").decode()
    assert "--calibration 'my text.txt' --calibration-windows 9" in text
    assert "| method | `gptq`, calibrated on my text.txt |" in text


@pytest.mark.parametrize(
    ("readme", "licences", "fields"),
    [
        (None, (), {}),
        ("# no front matter", (), {}),
        ("---\nlicense: [\n---\n", (), {}),
        ("---\n- a\n- b\n---\n", (), {}),
        ("---\nlicense: 5\nlicense_link: !!python/object/apply:os.system ['true']\n---\n", (), {}),
        ("---\nlicense: \"a\\u202eb\"\n---\n", (), {}),
        ("---\nlicense: mit\n---\n", (), {"license": "mit"}),
        ("---\nlanguage: zh\n---\n", ("LICENSE", "MODEL_LICENSE"), OTHER | {"license_link": "MODEL_LICENSE"}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", (), OTHER),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", ("LICENSE",), OTHER | {"license_link": "LICENSE"}),
        ("---\nlicense: Apache License 2.0\n---\n", (), OTHER),
    ],
)  # fmt: skip
def test_licences_are_repeated_and_never_invented(
    tmp_path: Path, readme: str | None, licences: tuple[str, ...], fields: dict[str, str]
) -> None:
    data, text = card_of(tmp_path, source_of(tmp_path, readme, *licences))
    assert {key: value for key, value in data.items() if key.startswith("license")} == fields
    assert ("came with no word on it" in text) == (not fields)
    if readme is not None and "Apache" in readme:
        assert "`Apache License 2.0`" in text


def test_what_it_says_is_in_the_report(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, source_of(tmp_path), Recipe(bits=8, group_size=64, quantize_head=True))
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    for entry in (*report["source"]["files"].values(), report["files"]["model.safetensors"]):
        assert entry["sha256"] in text
    assert f"{report['summary']['bits_per_weight']} bits per weight" in text
    assert "INT8, groups of 64; embeddings 16 bit, output head 8 bit" in text
    assert (
        "--bits 8 --group-size 64 --method mse --format compressed-tensors --layout native --quantize-head"
        in text
    )


def test_the_command_in_it_makes_the_same_bytes(tmp_path: Path) -> None:
    recipe = Recipe(bits=4, group_size=32, symmetric=False, layout="original")
    source = source_of(tmp_path)
    _, text = card_of(tmp_path, source, recipe)
    (line,) = [line for line in text.splitlines() if line.startswith("glmquant convert SOURCE OUT")]
    command = line.replace("SOURCE", str(source)).replace("OUT", str(tmp_path / "again")).split()[1:]
    assert run_cli(*command).returncode == 0
    for name in ("model.safetensors", CARD, REPORT):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_memory_is_that_of_recipes(tmp_path: Path) -> None:
    from glmquant.memory import Workload
    from glmquant.recipe import show_size

    source = source_of(tmp_path)
    recipe = Recipe(method="rtn", group_size=64)
    _, text = card_of(tmp_path, source, recipe)
    cells = {}
    for runtime in ("glmquant", "transformers", "vllm"):
        rows = glmquant.recipes(source, Workload(256), runtime=runtime)
        (row,) = [r for r in rows if r.name == "compressed-tensors int4 g64"]
        assert row.memory is not None
        cells[runtime] = show_size(row.memory.peak)
    assert f"| tokens | {' | '.join(cells)} |" in text
    assert f"| 256 | {' | '.join(cells.values())} |" in text


@pytest.mark.parametrize(
    ("recipe", "library", "said", "unsaid"),
    [
        (Recipe(method="rtn"), "transformers", ("from transformers import", "vllm serve", "glmquant chat"), ()),
        (Recipe(bits=8, format="cpm"), "glmquant", ("glmquant.load",), ("from transformers", "vLLM")),
        (Recipe(method="rtn", layout="original"), "glmquant", ("`ChatGLMModel`",), ("from transformers", "vllm serve")),
        (Recipe(quantize_embeddings=True), "glmquant", ("glmquant.load",), ("from transformers", "vllm serve")),
        (Recipe(bits=16), "transformers", ("from transformers import",), ("base_model_relation", "quantized")),
    ],
    ids=["native", "cpm", "original", "embeddings", "16-bit"],
)  # fmt: skip
def test_it_names_what_can_load_the_folder(
    tmp_path: Path, recipe: Recipe, library: str, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    data, text = card_of(tmp_path, source_of(tmp_path, _name_or_path="THUDM/chatglm3-6b"), recipe)
    assert data["library_name"] == library
    body = text.partition("\n---\n")[0] + text.partition("## How to load")[2]
    assert all(words in body for words in said)
    assert not [words for words in unsaid if words in body.replace("keeps quantized weights", "")]
    assert "llama.cpp reads GGUF files only" in text


@pytest.mark.parametrize(
    ("recipe", "packages"),
    [
        (Recipe(method="rtn"), "transformers compressed-tensors accelerate"),
        (Recipe(bits=16), "transformers accelerate"),
        (Recipe(format="bitsandbytes"), "transformers bitsandbytes accelerate"),
    ],
    ids=["native", "16-bit", "nf4"],
)
def test_it_names_the_packages_that_its_code_needs(tmp_path: Path, recipe: Recipe, packages: str) -> None:
    if recipe.format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    _, text = card_of(tmp_path, source_of(tmp_path), recipe)
    assert f"(`pip install {packages}`)" in text
    assert 'device_map="auto"' in text  # which is what accelerate is for


def test_chatglm_6b(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "first", CHATGLM, random_tensors(CHATGLM))
    glmquant.convert(folder, tmp_path / "out", Recipe(method="rtn"))
    assert front(tmp_path / "out" / CARD)["library_name"] == "glmquant"


def _fitted_card(source: Path, out: Path, budget: int, **options: Any) -> str:
    """The card; the command in it is run, and gives the same bytes."""
    glmquant.convert(source, out, Recipe(fit=Fit(budget, 128), **options))
    text = (out / CARD).read_text()
    command = re.search(r"^glmquant convert \S+ OUT (.*)$", text, re.M)
    assert command
    result = CliRunner().invoke(cli.main, ["convert", str(source), str(out) + "-again", *command[1].split()])
    assert result.exit_code == 0, result.output
    weights = [path.name for path in out.glob("*.safetensors")]
    assert all((out.parent / f"{out.name}-again" / n).read_bytes() == (out / n).read_bytes() for n in weights)
    return text


def test_a_budget(tmp_path: Path) -> None:
    """The card names what was chosen."""
    source = source_of(tmp_path)
    plan = plan_conversion(source, Recipe(group_size="row"))
    least = estimate(Model.of_plan(plan, "F16"), Workload(128)).peak
    found = set()
    for more in (100_000, 200_000, 300_000):
        out = tmp_path / str(more)
        text = _fitted_card(source, out, least + more)
        report = json.loads((out / REPORT).read_text())
        bits = {choice["bits"] for choice in report["recipe"]["fit"]["choices"]}
        for each in (4, 8):
            assert (f"INT{each}" in text) == (each in bits)
        assert ("and 16 bit, chosen" in text) == (16 in bits)
        tags = front(text)["tags"]
        assert "quantized" in tags
        assert "4-bit" not in tags
        found.add(frozenset(bits))
    assert found == {frozenset({4, 8}), frozenset({8}), frozenset({8, 16})}


def test_a_budget_in_which_everything_fits(tmp_path: Path) -> None:
    text = _fitted_card(
        source_of(tmp_path), tmp_path / "fit", 1 << 31, quantize_head=True, format="compressed-tensors"
    )
    assert f"--fit {1 << 31} --context 128 --batch 1 --layout native" in text
    assert "in 16 bit, in a layout that needs no remote code" in text
    assert "INT" not in text
    assert "quantized" not in front(text)["tags"]


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    card_of(tmp_path, source_of(tmp_path))
    figure = {"value": 0.012345, "error": 0.0004}
    found = {
        "text": "/home/somebody/mine.txt", "predictions": 1234, "window": 512, "dtype": "float32",
        **dict.fromkeys(("perplexity", "source_perplexity", "kl_mean", "top1_agreement"), figure),
    }  # fmt: skip
    (tmp_path / "out" / EVALUATION).write_text(json.dumps(found))
    text = folder_card(tmp_path / "out").decode()
    assert "| KL divergence, nats per token | 0.01235 ± 0.0004 |" in text
    assert "| same likeliest token | 1.234 ± 0.04 % |" in text
    assert "mine.txt" in text
    assert "/home" not in text
    assert glmquant.verify(tmp_path / "out").ok


def test_names_that_would_break_the_card(tmp_path: Path) -> None:
    """What other people wrote stays a value."""
    name = 'a"b: [x](javascript:1)'
    source = source_of(tmp_path, f"---\n{yaml.safe_dump({'license_name': name, 'language': ['zh: x']})}---\n")
    data, _ = card_of(tmp_path, source)
    assert data["language"] == ["zh: x"]
    assert "license_name" not in data or data["license_name"] == name


def test_an_edited_card_is_somebody_elses(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    card_of(tmp_path, source)
    out = tmp_path / "out"
    assert written_by_us(out)
    glmquant.convert(source, out, Recipe(method="rtn"), force=True)
    path = out / CARD
    written = path.read_bytes()
    for edited in (written + b"\n", b"x" + written, b"", written.replace(b"INT4", b"INT5")):
        path.write_bytes(edited)
        assert not written_by_us(out)
    assert glmquant.verify(out).ok
    with pytest.raises(OutputError, match=r"README\.md, which glmquant did not write"):
        glmquant.convert(source, out, Recipe(method="rtn"), force=True)
    path.unlink()
    assert written_by_us(out)
