"""Files that are written and read back past the page cache, in large aligned blocks.

A converted checkpoint is written once and, by this process, read once. Taking it through the page cache costs a fresh
page for every 4 KiB, which on a virtual machine can take more processor time than quantizing does, and pushes the
source out of the cache. Where a file system has no direct I/O, the same code goes through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import VerificationError

# A multiple of every device's block size, and large enough to keep a disk busy.
BLOCK = 4 << 20
_ALIGNMENT = 4096
# One is being filled while others are on their way to the disk and back.
_BUFFERS = 8
# Through the page cache, bytes are pushed to the disk this often: left alone, the kernel keeps gigabytes back for the
# final fsync, and the disk idles while weights are being quantized.
_SYNC_BYTES = 256 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS and Windows have none
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class _BlockFile:
    """An open file, past the page cache where that is possible."""

    def __init__(self, path: Path, flags: int) -> None:
        self.direct = bool(_DIRECT)
        try:
            self.fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if not self.direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._go_through_the_cache()
            self.fd = os.open(path, flags, 0o666)

    def write(self, data: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self.fd, data, offset)
        except OSError as error:
            self._only_direct(error)
            return os.pwrite(self.fd, data, offset)

    def read(self, into: mmap.mmap, offset: int) -> int:
        try:
            return os.preadv(self.fd, [into], offset)
        except OSError as error:
            self._only_direct(error)
            return os.preadv(self.fd, [into], offset)

    def _only_direct(self, error: OSError) -> None:
        """Some file systems take the flag but not the request; go on without. Raises `error` if it is another one."""
        if not self.direct or error.errno != errno.EINVAL:
            raise error
        import fcntl

        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~_DIRECT)
        self._go_through_the_cache()

    def _go_through_the_cache(self) -> None:
        self.direct = False


class BlockWriter:
    """A file, filled from its beginning to its end; a new one, or one whose first `begun` bytes are to stay.

    Blocks are written in the background, and behind that read back and compared with what is still in memory. Every
    method may raise what failed there: an `OSError`, or a `VerificationError` if a block came back different.

    Attributes:
        size: bytes given to `write`.
    """

    def __init__(self, path: Path, begun: int = 0) -> None:
        self._path = path
        self._file = _BlockFile(path, os.O_RDWR | (0 if begun else os.O_CREAT | os.O_TRUNC))
        self._empty = deque(mmap.mmap(-1, BLOCK) for _ in range(_BUFFERS))
        self._filled = 0  # bytes of the first empty one
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="glmquant-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="glmquant-read-back")
        self._read_back = mmap.mmap(-1, BLOCK)
        self._under_way: deque[tuple[mmap.mmap, Future[None]]] = deque()
        self.size = begun
        if begun % BLOCK:
            self._filled = begun % BLOCK
            self._file.read(self._empty[0], begun - self._filled)

    def write(self, data: memoryview) -> None:
        """Append bytes, which are copied; waits while all blocks are under way."""
        while data.nbytes:
            count = min(data.nbytes, BLOCK - self._filled)
            self._empty[0][self._filled : self._filled + count] = data[:count]
            data = data[count:]
            self._filled += count
            self.size += count
            if self._filled == BLOCK:
                self._send()

    def _send(self) -> None:
        buffer, count, self._filled = self._empty.popleft(), self._filled, 0
        offset = self.size - count
        written = self._writer.submit(self._put, buffer, count, offset)
        self._under_way.append((buffer, self._reader.submit(self._compare, written, buffer, count, offset)))
        while not self._empty:
            self._receive()

    def _receive(self) -> None:
        buffer, compared = self._under_way.popleft()
        self._empty.append(buffer)
        compared.result()

    def _put(self, buffer: mmap.mmap, count: int, offset: int) -> None:
        # Only the last block is not full; what is written beyond it is cut off again.
        whole = -(-count // _ALIGNMENT) * _ALIGNMENT
        with memoryview(buffer) as view:
            done = 0
            while done < whole:
                done += self._file.write(view[done:whole], offset + done)
        written = offset + count
        if not self._file.direct and offset // _SYNC_BYTES != written // _SYNC_BYTES:
            _sync(self._file.fd)

    def _compare(self, written: Future[None], buffer: mmap.mmap, count: int, offset: int) -> None:
        import numpy as np  # not above: whoever asks for --help has no use for it

        written.result()
        found = self._file.read(self._read_back, offset)
        same = np.array_equal(
            np.frombuffer(buffer, np.uint64, count // 8),
            np.frombuffer(self._read_back, np.uint64, count // 8),
        )
        rest = slice(count // 8 * 8, count)
        if found < count or not same or buffer[rest] != self._read_back[rest]:
            raise VerificationError(
                f"{self._path.name} reads back differently from what was written; the disk or the memory of this "
                "machine is faulty. OUT was not created."
            )

    def flush(self) -> None:
        """Have on the disk all that was given to `write`; what follows overwrites nothing of it with anything else."""
        while self._under_way:
            self._receive()
        if self._filled:
            buffer, offset = self._empty[0], self.size - self._filled
            written = self._writer.submit(self._put, buffer, self._filled, offset)
            self._reader.submit(self._compare, written, buffer, self._filled, offset).result()
        os.fsync(self._file.fd)

    def finish(self) -> None:
        """Write the rest; returns when the whole file is on the disk."""
        if self._filled:
            self._send()
        while self._under_way:
            self._receive()
        os.ftruncate(self._file.fd, self.size)
        os.fsync(self._file.fd)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._writer.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)
        os.close(self._file.fd)
