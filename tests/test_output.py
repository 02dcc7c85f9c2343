"""The folder OUT is whole or not there: refusals, replacement, locks."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers_convert import (
    SMALL_SHARDS,
    content,
    fail_late,
    partial_of,
    run_cli,
    small_source,
    start_cli,
    tmpfs,
    wait_until,
)

import glmquant
from glmquant import OutputError, Recipe
from glmquant.checkpoint import output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    glmquant.convert(source, out, SMALL_SHARDS)
    shards = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    others = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "quantization_report.json",
    ]
    assert sorted(p.name for p in out.iterdir()) == sorted([*shards, *others])  # no lock, no journal
    return content(out)


# What is there already


def test_existing_out_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists; choose another OUT, or replace it with --force\.$"):
        glmquant.convert(source, out)
    assert content(tmp_path) == {"out/notes.txt": b"mine"}


def test_force_does_not_replace_what_others_wrote(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"was not written by glmquant .* remove it yourself"):
        glmquant.convert(source, out, force=True)
    assert content(tmp_path) == {"out/notes.txt": b"mine"}


def test_out_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is not a folder"):
        glmquant.convert(source, tmp_path / "out", force=True)
    assert content(tmp_path) == {"out": b"mine"}


def test_empty_out_and_missing_parents_are_fine(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "a" / "b" / "out"
    glmquant.convert(source, out, SMALL_SHARDS)
    (tmp_path / "empty").mkdir()
    glmquant.convert(source, tmp_path / "empty", SMALL_SHARDS)
    assert content(out) == content(tmp_path / "empty") == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_folder_in_the_way_of_the_partial_one_is_left_alone(source: Path, tmp_path: Path) -> None:
    mine = partial_of(tmp_path / "out")
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial is where .* it holds something else"):
        glmquant.convert(source, tmp_path / "out")
    assert content(tmp_path) == {"out.partial/thesis.txt": b"mine"}


def test_source_with_the_name_of_the_partial_folder_survives(source: Path, tmp_path: Path) -> None:
    glmquant.convert(source, partial_of(tmp_path / "out"), Recipe(bits=16))
    before = content(tmp_path)
    with pytest.raises(OutputError):
        glmquant.convert(partial_of(tmp_path / "out"), tmp_path / "out")
    assert content(tmp_path) == before


def test_mount_point_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "out") as mounted:
        if not mounted:
            pytest.skip("no right to mount a file system")
        with pytest.raises(OutputError, match="is a mount point; choose a folder inside it"):
            glmquant.convert(source, tmp_path / "out")
    assert not partial_of(tmp_path / "out").exists()


def test_link_is_followed_and_stays(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to(real)
    glmquant.convert(source, link, Recipe(bits=8))
    glmquant.convert(source, link, SMALL_SHARDS, force=True)
    assert link.is_symlink()
    assert content(real) == undisturbed
    assert [p.name for p in real.parent.iterdir()] == ["real"]


# Replacing


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two renames"])
def test_force_replaces(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(bits=8))
    if not swaps:
        monkeypatch.setattr(output.ctypes, "CDLL", no_library)
    glmquant.convert(source, out, SMALL_SHARDS, force=True)
    assert content(out) == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def no_library(name: object, **options: object) -> None:
    raise OSError("no C library here")


def test_old_content_can_be_read_until_the_swap(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(bits=8, method="rtn"))
    old, seen = content(out), []
    glmquant.convert(
        source, out, SMALL_SHARDS, force=True, progress=lambda *_: seen.append(content(out) == old)
    )
    assert len(seen) > 10
    assert all(seen)
    assert content(out) != old


def can_exchange(folder: Path) -> bool:
    """Whether the system and the file system swap two folders in one step."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    try:
        rename = ctypes.CDLL(None).renameat2
        return bool(rename(-100, os.fsencode(folder / "a"), -100, os.fsencode(folder / "b"), 2) == 0)
    except (AttributeError, OSError, TypeError):
        return False
    finally:
        (folder / "a").rmdir()
        (folder / "b").rmdir()


def test_there_is_no_moment_without_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot swap folders")
    out = tmp_path / "out"
    recipes = [Recipe(bits=8, method="rtn"), Recipe(bits=4, method="rtn")]
    glmquant.convert(source, out, recipes[0])
    seen, renamed, missing, done = set(), [], 0, threading.Event()
    rename = os.rename

    def log_rename(before: Any, after: Any) -> None:
        renamed.append(Path(before))
        rename(before, after)

    def watch() -> None:
        nonlocal missing
        while not done.is_set():
            try:
                seen.add((out / "config.json").read_bytes())
            except FileNotFoundError:
                missing += 1

    monkeypatch.setattr(os, "rename", log_rename)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for recipe in [*recipes[::-1], *recipes[::-1]]:
        glmquant.convert(source, out, recipe, force=True)
    done.set()
    watcher.join()
    assert missing == 0
    assert out not in renamed  # it was swapped, it did not step aside
    assert len(seen) == 2  # the old and the new, never a half


def test_failed_conversion_keeps_the_old_content(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(bits=8))
    old = content(out)
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(source, out, SMALL_SHARDS, force=True, progress=fail_late)
    assert content(out) == old


def test_failed_swap_keeps_both(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(bits=8))
    old = content(out)
    rename = os.rename

    def refuse(before: Any, after: Any) -> None:
        if str(before).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(before, after)

    monkeypatch.setattr(output.ctypes, "CDLL", no_library)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        OutputError, match=r"cannot rename .* \(Input/output error\); the converted model is whole"
    ):
        glmquant.convert(source, out, SMALL_SHARDS, force=True)
    assert content(out) == old
    monkeypatch.undo()
    # What is whole is not taken for leftovers, and can be had with mv.
    with pytest.raises(OutputError, match=r"out\.partial is where .* it holds a whole model; move it away"):
        glmquant.convert(source, out, SMALL_SHARDS, force=True)
    shutil.rmtree(out)
    partial_of(out).rename(out)
    assert content(out) == undisturbed


def test_out_that_appears_meanwhile_is_not_replaced(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"

    def somebody_else(done: int, total: int, name: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="exists; choose another OUT"):
        glmquant.convert(source, out, SMALL_SHARDS, progress=somebody_else)
    assert content(out) == {"notes.txt": b"mine"}
    shutil.rmtree(out)
    glmquant.convert(source, out, SMALL_SHARDS, resume=True)  # no work was lost
    assert content(out) == undisturbed


def test_nothing_is_left_when_no_shard_was_finished(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(source, tmp_path / "out", progress=fail_late)
    assert list(tmp_path.iterdir()) == []


# Two at once


@pytest.mark.slow
def test_lock(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """One process is stopped in mid-work; others are refused until it is done, or dead."""
    big = small_source(tmp_path / "big", layers=4, hidden=512, ffn=1024)
    out = tmp_path / "out"
    for ending in (signal.SIGCONT, signal.SIGKILL):
        first = start_cli("convert", big, out, "--max-shard-size", "1MB", "--json", "--force")
        try:
            wait_until(lambda: (partial_of(out) / ".glmquant-journal.json").exists())
            first.send_signal(signal.SIGSTOP)
            with pytest.raises(OutputError, match=f"^another glmquant is writing {out} at this moment"):
                glmquant.convert(source, out, force=True)
            if ending == signal.SIGCONT:
                second = run_cli("convert", source, out, "--force")
                assert second.returncode == 2
                assert second.stderr.startswith("glmquant: another glmquant is writing")
                assert second.stderr.count("\n") == 1
            first.send_signal(ending)
            _, errors = first.communicate(timeout=60)
            assert (first.returncode, errors) == (
                (0, "") if ending == signal.SIGCONT else (-signal.SIGKILL, "")
            )
        finally:
            first.kill()  # does no harm to one that has ended; a stopped one must not stay
        assert glmquant.verify(out, big).ok  # the first one's, whole, both times
    glmquant.convert(source, out, SMALL_SHARDS, force=True)  # a dead process locks nothing
    assert content(out) == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "out"]
