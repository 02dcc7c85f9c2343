"""SHA-256 of the source's files, taken in the background while their weights are being quantized."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK = 4 << 20
# How far hashing may run ahead of quantizing. Being ahead is useful, it reads the disk in order for both;
# being too far ahead would push data out of the page cache before it is used.
_AHEAD = 2 << 30


def sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _slow(file)
        )


def _slow(file: object) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):  # type: ignore[attr-defined]
        digest.update(chunk)
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
        buffer = memoryview(bytearray(_CHUNK))
        for path in self._files:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    hashed += count
                    with self._moved:
                        while hashed > self._allowed and not self._stop:
                            self._moved.wait()
                        if self._stop:
                            return found
                size = file.tell()
            found[path.name] = {"bytes": size, "sha256": digest.hexdigest()}
        return found
