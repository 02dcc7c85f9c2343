"""Conversions that are killed, at any moment, and resumed: OUT never exists half, and ends up the same."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers_convert import (
    SMALL_SHARDS,
    content,
    fail_late,
    flip_byte,
    partial_of,
    run_cli,
    small_source,
    start_cli,
    wait_until,
)
from safetensors.torch import save_file

import glmquant
from glmquant import OutputError, Recipe
from glmquant.checkpoint.output import REPORT

RECIPE = Recipe(max_shard_size=1_000_000)
OPTIONS = ["--max-shard-size", "1MB", "--workers", "1", "--json"]
SHARDS = 22
SEED = 20240611

# When to kill: so many seconds after the start; or when so many files are in the partial folder; or near the end.
SECONDS = [0.1, 0.5, 1.0]
FILES = [1, 3, 6, 9, 12, 15, 18, 21]
ENDS = ["all shards", "report", "committed"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 MB, of which `RECIPE` makes `SHARDS` shards in half a second."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return small_source(folder, layers=10, hidden=512, ffn=1280, vocab=2048, shards=3)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    glmquant.convert(source, out, RECIPE)
    files = content(out)
    assert sum(name.endswith(".safetensors") for name in files) == SHARDS
    return files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def half(small: Path, tmp_path: Path) -> Path:
    """OUT of a conversion of `small` that stopped with two of four shards whole."""
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(small, tmp_path / "out", SMALL_SHARDS, progress=fail_late)
    assert len(whole_shards(tmp_path / "out")) == 2
    return tmp_path / "out"


@pytest.fixture(scope="module")
def small_undisturbed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    glmquant.convert(small, out, SMALL_SHARDS)
    return content(out)


def whole_shards(out: Path) -> list[Path]:
    """Shards that the journal of an interrupted run vouches for."""
    try:
        journal = (partial_of(out) / ".glmquant-journal.json").read_text()
    except FileNotFoundError:  # not there yet, or no more
        return []
    return [partial_of(out) / name for name in sorted(json.loads(journal)["shards"])]


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def wait_for(moment: float | int | str, out: Path, process: subprocess.Popen[str]) -> None:
    partial = partial_of(out)
    if isinstance(moment, float):
        time.sleep(moment)
        return

    def come() -> bool:
        if process.poll() is not None or (out / REPORT).exists():
            return True
        if moment == "committed":
            return False
        if moment == "report":
            return (partial / REPORT).exists()
        return len(list(partial.glob("*.safetensors"))) >= (SHARDS if moment == "all shards" else moment)

    wait_until(come)
    # Anywhere within the next shard.
    time.sleep(random.Random(f"{SEED} {moment}").uniform(0, 0.01))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*SECONDS, *FILES, *ENDS])
def test_kill(source: Path, tmp_path: Path, undisturbed: dict[str, bytes], moment: float | int | str) -> None:
    out = tmp_path / "out"
    for _ in range(3):
        process = start_cli("convert", source, out, *OPTIONS)
        wait_for(moment, out, process)
        process.kill()
        _, errors = process.communicate()
        assert errors == ""
        if moment not in FILES or process.returncode:
            break
        shutil.rmtree(out)  # it was done before the signal came: not what this is about
    if out.exists():  # then it is whole, the moment of the kill notwithstanding
        assert glmquant.verify(out).ok
        assert without_lock(content(out)) == undisturbed
        assert not partial_of(out).exists()
        return
    kept = {path.name: identity(path) for path in whole_shards(out)}
    if moment in FILES:
        assert moment - 2 <= len(kept) <= SHARDS
    glmquant.convert(source, out, RECIPE, resume=True)
    assert content(out) == undisturbed
    assert {name: identity(out / name) for name in kept} == kept  # what was whole was not done again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def without_lock(files: dict[str, bytes]) -> dict[str, bytes]:
    """Between the rename and the removal of the lock file there is a moment in which a kill leaves it behind."""
    return {name: data for name, data in files.items() if name != ".glmquant-lock"}


@pytest.mark.slow
def test_kills_in_a_row(source: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Every resumed run gets further, and is killed too."""
    out, done, kills = tmp_path / "out", 0, 0
    for target in (3, 6, 9):
        process = start_cli("convert", source, out, *OPTIONS, "--resume")
        wait_until(
            lambda count=target, run=process: len(whole_shards(out)) >= count or run.poll() is not None
        )
        process.kill()
        process.communicate()
        if out.exists():
            break  # it was faster than we
        kills += process.returncode == -signal.SIGKILL
        assert len(whole_shards(out)) >= max(target, done)
        done = len(whole_shards(out))
    assert kills
    if out.exists():
        assert without_lock(content(out)) == undisturbed
        return
    last = run_cli("convert", source, out, *OPTIONS, "--resume")
    assert (last.returncode, last.stderr) == (0, "")
    assert content(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 8, "all shards"])
def test_ctrl_c(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], moment: float | int | str
) -> None:
    out = tmp_path / "out"
    options = [*OPTIONS[:2], "--workers", "3", "--json"]
    for _ in range(5):
        process = start_cli("convert", source, out, *options)
        wait_for(moment, out, process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        if process.returncode != 0 or moment == "all shards":
            break
        shutil.rmtree(out)  # it was done before the signal came: not what this is about
    if process.returncode != 0 or moment != "all shards":  # it may have been too late
        assert process.returncode == 130
        assert output == ""
        assert re.fullmatch(r"glmquant: interrupted; OUT is as it was, .* --resume .*\.\n", errors)
        assert not out.exists()
        glmquant.convert(source, out, RECIPE, resume=True)
    assert content(out) == undisturbed


def test_ctrl_c_keeps_what_is_replaced(source: Path, tmp_path: Path, small: Path) -> None:
    out = tmp_path / "out"
    glmquant.convert(small, out, SMALL_SHARDS)
    old = content(out)
    for _ in range(5):
        process = start_cli("convert", source, out, *OPTIONS, "--force")
        wait_until(lambda: len(whole_shards(out)) >= 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        if process.returncode != 0:
            break
        glmquant.convert(small, out, SMALL_SHARDS, force=True)  # it was too late: once more
    assert process.returncode == 130
    assert content(out) == old


# What may be resumed


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="rtn", max_shard_size=100_000, bits=8),
        Recipe(method="rtn", max_shard_size=100_000, group_size=32),
        Recipe(method="mse", max_shard_size=100_000),
        Recipe(method="rtn", max_shard_size=90_000),
        Recipe(method="rtn", max_shard_size=100_000, layout="original"),
    ],
    ids=["bits", "group", "method", "shard size", "layout"],
)
def test_other_options_are_not_resumed(small: Path, half: Path, recipe: Recipe) -> None:
    before = content(partial_of(half))
    with pytest.raises(
        OutputError, match=r"was begun with other options .* without --resume to start over\.$"
    ):
        glmquant.convert(small, half, recipe, resume=True)
    assert (
        content(partial_of(half)) == before
    )  # and the finished shards are still there for who knows the options
    assert not half.exists()


def test_worker_count_may_change(small: Path, half: Path, small_undisturbed: dict[str, bytes]) -> None:
    glmquant.convert(small, half, SMALL_SHARDS, workers=5, resume=True)
    assert content(half) == small_undisturbed


@pytest.mark.parametrize("change", ["mtime", "size"])
def test_changed_source_is_not_resumed(small: Path, tmp_path: Path, change: str) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(small, source)
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(source, out, SMALL_SHARDS, progress=fail_late)
    weights = source / "model.safetensors"
    before = weights.stat()
    if change == "mtime":
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:  # the same tensors, behind a header with more spaces
        data = weights.read_bytes()
        length = int.from_bytes(data[:8], "little")
        weights.write_bytes(
            (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
        )
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OutputError, match="or from another source"):
        glmquant.convert(source, out, SMALL_SHARDS, resume=True)
    glmquant.convert(source, out, SMALL_SHARDS)
    assert glmquant.verify(out, source).ok


def test_changed_adapter_is_not_resumed(small: Path, tmp_path: Path) -> None:
    """The same low-rank matrices, scaled differently."""
    adapter, out = tmp_path / "lora", tmp_path / "out"
    adapter.mkdir()
    module = "base_model.model.transformer.encoder.layers.0.self_attention.dense."
    matrices = {module + "lora_A.weight": torch.ones(4, 128), module + "lora_B.weight": torch.ones(128, 4)}
    save_file(matrices, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(small, out, SMALL_SHARDS, adapter=adapter, progress=fail_late)
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    with pytest.raises(OutputError, match="or from another source"):
        glmquant.convert(small, out, SMALL_SHARDS, adapter=adapter, resume=True)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_damaged_shard_is_done_again(
    small: Path, half: Path, small_undisturbed: dict[str, bytes], damage: str
) -> None:
    good, bad = whole_shards(half)
    kept = identity(good)
    if damage == "flipped":
        flip_byte(bad)
    elif damage == "short":
        os.truncate(bad, bad.stat().st_size - 1)
    else:
        bad.unlink()
    glmquant.convert(small, half, SMALL_SHARDS, resume=True)
    assert content(half) == small_undisturbed
    assert identity(half / good.name) == kept


@pytest.mark.parametrize("journal", ["", "{", "[]", '{"shards": {}}', '{"digest": "x"}', "\0"])
def test_damaged_journal_vouches_for_nothing(
    small: Path, half: Path, small_undisturbed: dict[str, bytes], journal: str
) -> None:
    old = identity(whole_shards(half)[0])
    (partial_of(half) / ".glmquant-journal.json").write_text(journal)
    glmquant.convert(small, half, SMALL_SHARDS, resume=True)
    assert content(half) == small_undisturbed
    assert identity(half / "model-00001-of-00004.safetensors") != old


def test_foreign_files_in_the_partial_folder_do_not_reach_out(
    small: Path, half: Path, small_undisturbed: dict[str, bytes]
) -> None:
    (partial_of(half) / "model-00004-of-00004.safetensors").write_bytes(b"half a shard")
    (partial_of(half) / "cache").mkdir()
    (partial_of(half) / "link").symlink_to(half.parent)
    glmquant.convert(small, half, SMALL_SHARDS, resume=True)
    assert content(half) == small_undisturbed


def test_without_resume_it_starts_over(small: Path, half: Path, small_undisturbed: dict[str, bytes]) -> None:
    old = {path.name: identity(path) for path in whole_shards(half)}
    done = []
    glmquant.convert(small, half, SMALL_SHARDS, progress=lambda now, total, name: done.append(now))
    assert done[0] < 100_000  # from the first tensor
    assert content(half) == small_undisturbed
    assert not set(old.values()) & {identity(half / name) for name in old}


def test_progress_goes_on_from_what_is_done(small: Path, half: Path) -> None:
    done = []
    glmquant.convert(small, half, SMALL_SHARDS, resume=True, progress=lambda *step: done.append(step[:2]))
    assert done[0][0] > done[0][1] / 4
    assert done[-1][0] == done[-1][1]


def test_resume_without_anything_to_resume(
    small: Path, tmp_path: Path, small_undisturbed: dict[str, bytes]
) -> None:
    glmquant.convert(small, tmp_path / "out", SMALL_SHARDS, resume=True)
    assert content(tmp_path / "out") == small_undisturbed
