"""Sources that are not there, and an OUT that must not be written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_sources import (
    refused,
    tiny_model,
)

from glmquant import (
    OutputError,
    Recipe,
    convert,
    inspect,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Places to read from and to write to.


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("THUDM/chatglm3-6b", "hf download THUDM/chatglm3-6b --local-dir"),
        ("hf:THUDM/chatglm3-6b@main", "hf download THUDM/chatglm3-6b --revision main"),
        ("ms:ZhipuAI/chatglm3-6b", "modelscope download --model ZhipuAI/chatglm3-6b"),
    ],
)
def test_a_model_that_is_not_here_says_how_to_get_it(source: str, command: str, out: Path) -> None:
    refused(source, out, source, command)


@pytest.mark.parametrize(
    "source", ["", "no/such/folder", "/no/such", "./model", "~nobody/model", "a\0b"], ids=repr
)
def test_a_source_that_does_not_exist(source: str, out: Path) -> None:
    refused(source, out, repr(source), "does not exist")


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_cannot_be_written(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(folder, tmp_path / "closed" / "out", "cannot write", error=OutputError)
