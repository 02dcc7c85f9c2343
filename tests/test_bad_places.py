"""Sources that are not there, and an OUT that must not be written to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers_sources import (
    refused,
    tiny_model,
)
from safetensors.torch import save_file

import glmquant
from glmquant import (
    OutputError,
    Recipe,
    cli,
    convert,
    inspect,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Places to read from and to write to.


@pytest.mark.parametrize(
    "source", ["", "no/such/folder", "/no/such", "./model", "~nobody/model", "a\0b"], ids=repr
)
def test_a_source_that_does_not_exist(source: str, out: Path) -> None:
    refused(source, out, repr(source), "does not exist")


def test_an_empty_out_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a script whose variable is not set."""
    source, here = tiny_model(tmp_path), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for arguments, said in ((["convert", str(source), ""], "OUT is empty"), (["convert", "", "out"], "''")):
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 2
        assert re.fullmatch(rf"glmquant: .*{said}.*\.\n", result.stderr)
    assert list(here.iterdir()) == []


def test_a_source_that_is_a_file(tmp_path: Path, out: Path) -> None:
    file = tiny_model(tmp_path) / "model.safetensors"
    refused(file, out, str(file), "is a file", "folder")


@pytest.mark.parametrize("inside", [".", "out", "deep/er/out"])
def test_out_inside_the_source(inside: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    before = sorted(folder.iterdir())
    for force in (False, True):
        refused(folder, folder / inside, "is inside the source", error=OutputError, force=force)
    assert sorted(folder.iterdir()) == before


def test_out_inside_the_source_by_another_name(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    refused(folder, tmp_path / "link" / "out", "is inside the source", error=OutputError)
    refused(tmp_path / "link", folder / "out", "is inside the source", error=OutputError)
    refused(folder, tmp_path / "other" / ".." / "model", "is inside the source", error=OutputError)


def test_the_source_inside_out(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "here")
    for force in (False, True):
        refused(folder, tmp_path / "here", "is inside OUT", error=OutputError, force=force)
    assert inspect(folder).family == "chatglm2"


def test_out_is_a_file(tmp_path: Path, out: Path) -> None:
    out.write_text("precious")
    for force in (False, True):
        refused(tiny_model(tmp_path), out, str(out), "not a folder", error=OutputError, force=force)
    assert out.read_text() == "precious"


def test_out_exists(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    convert(folder, out)
    first = (out / "model.safetensors").read_bytes()
    refused(folder, out, str(out), "exists", "--force", error=OutputError, recipe=Recipe(bits=8))
    assert (out / "model.safetensors").read_bytes() == first
    convert(folder, out, Recipe(bits=8), force=True)
    assert (out / "model.safetensors").read_bytes() != first


def test_force_replaces_nothing_but_what_glmquant_wrote(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refused(tiny_model(tmp_path), out, str(out), "not written by glmquant", error=OutputError, force=True)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_an_empty_out_is_no_obstacle(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    convert(tiny_model(tmp_path), out)
    assert (out / "config.json").exists()


def test_out_below_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    refused(tiny_model(tmp_path), file / "out", "cannot write", str(file), error=OutputError)
    assert file.read_text() == "precious"


def test_out_and_adapter_may_not_lie_in_each_other(tmp_path: Path) -> None:
    """With force, an adapter inside OUT would be deleted together with the old OUT."""
    source = Path(__file__).parent / "golden/chatglm3-6b/tiny/bin-fp16"
    out = tmp_path / "out"
    glmquant.convert(source, out, glmquant.Recipe(bits=16))
    adapter = out / "adapter"
    adapter.mkdir()
    weight = "base_model.model.transformer.encoder.layers.0.self_attention.dense"
    save_file(
        {f"{weight}.lora_A.weight": torch.ones(2, 64), f"{weight}.lora_B.weight": torch.ones(64, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(glmquant.OutputError, match=r"the adapter .* is inside OUT"):
        glmquant.convert(source, out, glmquant.Recipe(bits=16), adapter=adapter, force=True)
    assert adapter.exists()
    with pytest.raises(glmquant.OutputError, match="is inside the adapter"):
        glmquant.convert(source, adapter / "new", glmquant.Recipe(bits=16), adapter=adapter)


def test_force_does_not_delete_what_glmquant_did_not_write(tmp_path: Path, out: Path) -> None:
    source = tiny_model(tmp_path)
    convert(source, out)
    (out / "my_notes.txt").write_text("keep me")
    with pytest.raises(OutputError, match=r"my_notes\.txt"):
        convert(source, out, force=True)
    assert (out / "my_notes.txt").read_text() == "keep me"


def test_somebody_elses_partial_folder_is_left_alone(tmp_path: Path, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.mkdir()
    (partial / "progress.json").write_text("{}")
    (partial / "thesis.txt").write_text("keep me")
    with pytest.raises(OutputError, match="holds something else"):
        convert(tiny_model(tmp_path), out)
    assert (partial / "thesis.txt").read_text() == "keep me"


def test_files_beside_the_weights_are_checked_before_the_weights_are_read(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(tmp_path)
    (source / "tokenizer_config.json").write_text("[]")
    monkeypatch.setattr("glmquant._quantize.run", lambda *_: pytest.fail("a weight was read"))
    refused(source, out, "tokenizer_config.json")


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_some(tmp_path: Path, out: Path, workers: int) -> None:
    with pytest.raises(glmquant.UsageError, match="workers"):
        convert(tiny_model(tmp_path), out, workers=workers)
