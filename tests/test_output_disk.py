"""Disks that are full or read-only, and power that fails."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_convert import SMALL_SHARDS, content, fail_late, partial_of, small_source, tmpfs

import glmquant
from glmquant import OutputError, Recipe, VerificationError
from glmquant.checkpoint import output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    glmquant.convert(source, out, SMALL_SHARDS)
    return content(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where the system lets us have one."""
    with tmpfs(tmp_path / "disk", "-o", "size=2m") as mounted:
        if not mounted:
            pytest.skip("no right to mount a file system")
        yield tmp_path / "disk"


# No room, no right


class FullDisk:
    """Files below `folder` can grow by `room` bytes in all."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room
        self._open, self._pwrite = Path.open, os.pwrite

    def open(self, path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = self._open(path, mode, *args, **options)
        return _Limited(file, self) if "w" in mode and path.is_relative_to(self.folder) else file

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        """How shards are written."""
        return self._pwrite(descriptor, data[: self.take(len(data))], offset)

    def take(self, wanted: int) -> int:
        """A short write, as a disk that fills up does it."""
        written = min(wanted, self.room)
        self.room -= written
        if wanted and not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written


class _Limited:
    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        return int(self._file.write(data[: self._disk.take(len(data))]))


ROOMS = [0, 500, 90_000, 200_000, 320_000]  # of 324 kB of shards, in four


@pytest.mark.parametrize("room", ROOMS)
def test_full_disk(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    out = tmp_path / "out"
    disk = FullDisk(tmp_path, room)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **options: disk.open(path, *args, **options))
        patch.setattr(os, "pwrite", disk.pwrite)
        with pytest.raises(OutputError, match=r"^no room left in .* --resume\.$"):
            glmquant.convert(source, out, SMALL_SHARDS)
    assert not out.exists()
    assert partial_of(out).exists() == (room >= 200_000)  # kept where a shard was finished
    glmquant.convert(source, out, SMALL_SHARDS, resume=True)
    assert content(out) == undisturbed


def test_disk_that_loses_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such errors come late, with fsync."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 50_000:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"^cannot write to .*out\.partial: Input/output error\.$"):
        glmquant.convert(source, tmp_path / "out", SMALL_SHARDS)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_changes_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the second shard."""
    opened, pwrite = os.open, os.pwrite
    second: list[int] = []

    def noting(path: Any, *args: Any) -> int:
        descriptor = opened(path, *args)
        if str(path).endswith("model-00002-of-00004.safetensors"):
            second.append(descriptor)
        return descriptor

    def corrupting(descriptor: int, data: Any, offset: int) -> int:
        if descriptor not in second:
            return pwrite(descriptor, data, offset)
        with mmap.mmap(-1, len(data)) as aligned:  # as direct I/O wants it
            aligned[:] = bytes(data)
            aligned[5_000] ^= 1
            return pwrite(descriptor, aligned, offset)

    monkeypatch.setattr(os, "open", noting)
    monkeypatch.setattr(os, "pwrite", corrupting)
    with pytest.raises(VerificationError, match=r"^model-00002-of-00004\.safetensors reads back differently"):
        glmquant.convert(source, tmp_path / "out", SMALL_SHARDS)
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_for_the_small_files(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards fit, config.json or the report does not."""
    out = tmp_path / "out"
    for name in ("config.json", "model.safetensors.index.json", "quantization_report.json"):
        disk = FullDisk(tmp_path, 0)

        def limited(path: Path, *args: Any, disk: FullDisk = disk, name: str = name, **options: Any) -> Any:
            return (disk.open if path.name == name else disk._open)(path, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", limited)
            with pytest.raises(OutputError, match="no room left in"):
                glmquant.convert(source, out, SMALL_SHARDS, resume=True)
        assert not out.exists()
    glmquant.convert(source, out, SMALL_SHARDS, resume=True)
    assert content(out) == undisturbed


def test_real_full_disk(small_disk: Path, source: Path, undisturbed: dict[str, bytes]) -> None:
    """Something else takes the rest of the disk after the check for room."""
    out, hog = small_disk / "out", small_disk / "hog"

    def take_the_rest(done: int, total: int, name: str) -> None:
        if done > total / 2 and not hog.exists():
            with hog.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    pass

    needed = sum(len(data) for name, data in undisturbed.items() if name.endswith(".safetensors"))
    stated = rf"no room left in {small_disk}: the conversion needs {needed / 2**20:.2f} MiB there\."
    with pytest.raises(OutputError, match=stated):
        glmquant.convert(source, out, SMALL_SHARDS, progress=take_the_rest)
    assert not out.exists()
    hog.unlink()
    glmquant.convert(source, out, SMALL_SHARDS, resume=True)
    assert content(out) == undisturbed


def test_too_little_room_is_seen_before_the_work(small_disk: Path, source: Path) -> None:
    (small_disk / "hog").write_bytes(bytes(1_800_000))
    worked = []
    with pytest.raises(OutputError, match=r"needs 0\.\d+ .iB in .* where only 0\.\d+ .iB are free"):
        glmquant.convert(source, small_disk / "out", progress=lambda *step: worked.append(step))
    assert worked == []
    assert sorted(p.name for p in small_disk.iterdir()) == ["hog"]


def test_room_check_counts_what_is_left_to_do(
    source: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        glmquant.convert(source, out, SMALL_SHARDS, progress=fail_late)
    kept = sum(path.stat().st_size for path in partial_of(out).glob("*.safetensors"))
    needed = sum(len(data) for name, data in undisturbed.items() if name.endswith(".safetensors"))
    usage = shutil.disk_usage(tmp_path)
    assert kept > 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match="are free"):
        glmquant.convert(source, tmp_path / "other", SMALL_SHARDS)
    glmquant.convert(source, out, SMALL_SHARDS, resume=True)
    assert content(out) == undisturbed


def test_parent_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^cannot write to .*: Not a directory\.$"):
        glmquant.convert(source, tmp_path / "file" / "out")
    locked = tmp_path / "locked"
    with tmpfs(locked, "-o", "ro") as mounted:
        if not mounted:
            if os.geteuid() == 0:
                pytest.skip("the superuser may write everywhere")
            locked.chmod(0o500)
        with pytest.raises(
            OutputError, match=r"^cannot write to .*: (Permission denied|Read-only file system)\.$"
        ):
            glmquant.convert(source, locked / "out")
        assert list(locked.iterdir()) == []


# Power loss


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
def test_everything_is_on_disk_before_the_final_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "out"
    partial = partial_of(out)
    if force:
        glmquant.convert(source, out, Recipe(bits=8))
    events: list[tuple[str, str, int]] = []
    fsync, rename, exchange, unlink = os.fsync, os.rename, output._exchange, os.unlink

    def log_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("fsync", str(path), os.fstat(descriptor).st_size))

    def log_rename(before: Any, after: Any) -> None:
        events.append(("rename", str(before), 0))
        rename(before, after)

    def log_exchange(new: Path, old: Path) -> Path:
        events.append(("rename", str(new), 0))
        return exchange(new, old)

    def log_unlink(path: Any, **options: Any) -> None:
        events.append(("unlink", str(path), 0))
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    monkeypatch.setattr(os, "unlink", log_unlink)
    monkeypatch.setattr(output, "_exchange", log_exchange)
    glmquant.convert(source, out, SMALL_SHARDS, force=force)
    final = events.index(("rename", str(partial), 0))
    before = events[:final]
    for name, data in content(out).items():
        assert ("fsync", str(partial / name), len(data)) in before, f"{name} was not on disk at its full size"
    # The names in the folder, too: nothing appears in it or leaves it after its last fsync.
    last = max(n for n, event in enumerate(before) if event[:2] == ("fsync", str(partial)))
    assert not [e for e in before[last + 1 :] if e[1].startswith(str(partial))]
    assert [e[:2] for e in before].index(("unlink", str(partial / ".glmquant-journal.json"))) < last
    # And the new name itself, before anything old is removed.
    after = [event[:2] for event in events[final + 1 :]]
    parent = after.index(("fsync", str(tmp_path)))
    assert not [
        path for kind, path in after[:parent] if kind == "unlink" and not path.endswith("/.glmquant-lock")
    ]
