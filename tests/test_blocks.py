"""Files written and read past the page cache, on file systems that allow it and on others."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers_convert import tmpfs

from glmquant.checkpoint import blocks
from glmquant.checkpoint.blocks import BLOCK, BlockWriter
from glmquant.errors import VerificationError

SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 12345]


def data_of(size: int) -> bytes:
    return (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]


def write(path: Path, data: bytes, piece: int = 1_000_003) -> None:
    writer = BlockWriter(path)
    view = memoryview(data)
    try:
        for start in range(0, len(data), piece):
            writer.write(view[start : start + piece])
        assert writer.size == len(data)
        writer.finish()
    finally:
        writer.close()


def no_flag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(blocks, "_DIRECT", 0)


def refused_when_opened(patch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args)

    patch.setattr(os, "open", refuse)


def refused_when_used(patch: pytest.MonkeyPatch) -> None:
    import fcntl

    pwrite, preadv = os.pwrite, os.preadv

    def refuse(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")

    patch.setattr(os, "pwrite", lambda fd, data, at: (refuse(fd), pwrite(fd, data, at))[1])
    patch.setattr(os, "preadv", lambda fd, into, at: (refuse(fd), preadv(fd, into, at))[1])


def short_writes(patch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(4096, len(data) // 3)], at))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "how",
    [None, no_flag, refused_when_opened, refused_when_used, short_writes],
    ids=lambda h: getattr(h, "__name__", ""),
)
def test_what_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any, size: int
) -> None:
    if how is not None:
        how(monkeypatch)
    data = data_of(size)
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "memory") as mounted:
        if not mounted:
            pytest.skip("no right to mount a file system")
        data = data_of(BLOCK + 5)
        write(tmp_path / "memory" / "file", data)
        assert (tmp_path / "memory" / "file").read_bytes() == data


@pytest.mark.parametrize("size", [1, 12, 4096, BLOCK, 3 * BLOCK + 4097])
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_bit_that_changes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, where: str
) -> None:
    preadv = os.preadv
    at = 0 if where == "first" else size - 1

    def changed(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        if offset <= at < offset + count:
            buffers[0][at - offset] ^= 0x10
        return count

    monkeypatch.setattr(os, "preadv", changed)
    with pytest.raises(VerificationError, match=r"^file reads back differently from what was written"):
        write(tmp_path / "file", data_of(size))


def test_an_end_that_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, into, at) // 2)
    with pytest.raises(VerificationError, match="reads back differently"):
        write(tmp_path / "file", data_of(BLOCK + 10_000))


def test_errors_of_the_background_reach_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    writer = BlockWriter(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - one of the calls, whichever
        for _ in range(8):
            writer.write(memoryview(bytes(BLOCK)))
        writer.finish()
    writer.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("glmquant-write", "glmquant-read-back"))]


def test_other_errors_are_not_taken_for_a_missing_ability(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockWriter(tmp_path / "absent" / "file")
