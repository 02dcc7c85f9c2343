"""SHA-256 of the source's files, taken in the background while their weights are being quantized."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Self

# How much is given to the hash function at a time, and mapped at a time.
_CHUNK = 4 << 20
_WINDOW = 64 << 20
# How far hashing may run ahead of quantizing. Being ahead is useful, it reads the disk in order for both;
# being too far ahead would push data out of the page cache before it is used.
_AHEAD = 2 << 30


def feed(digest: hashlib._Hash, file: BinaryIO, start: int, stop: int) -> None:
    """Update `digest` with bytes ``start..stop`` of a file that has them.

    Through a mapping: copying out of the page cache costs a quarter of what SHA-256 does.
    """
    while start < stop:
        base = start - start % mmap.ALLOCATIONGRANULARITY
        end = min(stop, base + _WINDOW)
        with mmap.mmap(file.fileno(), end - base, access=mmap.ACCESS_READ, offset=base) as mapped:
            _expect_all(mapped)
            with memoryview(mapped) as view:
                for at in range(start - base, end - base, _CHUNK):
                    digest.update(view[at : min(at + _CHUNK, end - base)])
        start = end


def _expect_all(mapped: mmap.mmap) -> None:
    """Say that the whole mapping will be read: in huge pages where file systems have them.

    Reading from the disk 4 KiB at a time costs more processor time than hashing what was read, on virtual machines
    most of all, where the host is asked for each fresh page.
    """
    for name in ("MADV_HUGEPAGE", "MADV_SEQUENTIAL"):
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or a kernel without it
            mapped.madvise(getattr(mmap, name))
            return


def sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        feed(digest, file, 0, path.stat().st_size)
    return digest.hexdigest()


class BackgroundHasher:
    """Hashes `files` in order in one thread; a context manager.

    Call `consumed` with the bytes that have been quantized, so that it keeps its distance.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="glmquant-hash")
        self._allowed = _AHEAD
        self._moved = threading.Condition()
        self._stop = False
        self._future: Future[dict[str, dict[str, object]]] | None = None

    def __enter__(self) -> Self:
        self._future = self._pool.submit(self._run)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._moved:
            self._stop = True
            self._moved.notify()
        self._pool.shutdown()

    def consumed(self, nbytes: int) -> None:
        """`nbytes` more of the source have been quantized."""
        with self._moved:
            self._allowed += nbytes
            self._moved.notify()

    def result(self) -> dict[str, dict[str, object]]:
        """``{file name: {"bytes": n, "sha256": hex}}``; waits for the rest."""
        assert self._future is not None
        with self._moved:
            self._allowed = 1 << 62
            self._moved.notify()
        return self._future.result()

    def _run(self) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        hashed = 0
        for path in self._files:
            digest = hashlib.sha256()
            size = path.stat().st_size
            with path.open("rb") as file:
                for start in range(0, size, _WINDOW):
                    stop = min(size, start + _WINDOW)
                    feed(digest, file, start, stop)
                    hashed += stop - start
                    with self._moved:
                        while hashed > self._allowed and not self._stop:
                            self._moved.wait()
                        if self._stop:
                            return found
            # Shards in subfolders and an adapter may share a name.
            name = path.name if path.name not in found else f"{path.parent.name}/{path.name}"
            found[name] = {"bytes": size, "sha256": digest.hexdigest()}
        return found
