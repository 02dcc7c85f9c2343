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
from glmquant.checkpoint.blocks import BLOCK, BlockReader, BlockWriter

SIZES = [0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 12345]


def data_of(size: int) -> bytes:
    return (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]


def write(path: Path, data: bytes, piece: int = 1_000_003) -> None:
    writer = BlockWriter(path)
    view = memoryview(data)
    for start in range(0, len(data), piece):
        writer.write(view[start : start + piece])
    assert writer.size == len(data)
    writer.finish()
    assert writer.completed == len(data)
    writer.close()


def read(path: Path, stop: int) -> bytes:
    reader = BlockReader(path)
    found = b"".join(bytes(piece) for piece in reader.up_to(stop))
    reader.close()
    return found


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
    assert read(tmp_path / "file", size) == data


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "memory") as mounted:
        if not mounted:
            pytest.skip("no right to mount a file system")
        data = data_of(BLOCK + 5)
        write(tmp_path / "memory" / "file", data)
        assert read(tmp_path / "memory" / "file", len(data)) == data


def test_reading_behind_the_writer(tmp_path: Path) -> None:
    data = data_of(9 * BLOCK + 77)
    writer = BlockWriter(tmp_path / "file")
    reader = BlockReader(tmp_path / "file")
    found = bytearray()
    for start in range(0, len(data), 3 << 20):
        writer.write(memoryview(data)[start : start + (3 << 20)])
        assert writer.completed % BLOCK == 0
        for piece in reader.up_to(writer.completed):
            found += piece
    writer.finish()
    for piece in reader.up_to(writer.completed):
        found += piece
    assert bytes(found) == data
    writer.close()
    reader.close()


def test_a_file_that_lost_its_end(tmp_path: Path) -> None:
    write(tmp_path / "file", data_of(BLOCK + 10))
    os.truncate(tmp_path / "file", 100)
    assert len(read(tmp_path / "file", BLOCK + 10)) == 100


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
    assert not [t for t in threading.enumerate() if t.name.startswith("glmquant-write")]


def test_other_errors_are_not_taken_for_a_missing_ability(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockWriter(tmp_path / "absent" / "file")
