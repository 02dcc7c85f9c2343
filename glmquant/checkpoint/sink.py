"""Writing safetensors shards as a stream: headers first, then rows as they come, hashed on their way.

The plan knows every tensor before the first byte is written, so a shard's header can be written first and the
data appended in one pass; nothing needs a whole tensor in memory. What has been written is read back and compared,
see `blocks`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .blocks import BlockWriter
from .output import write_error
from .source import ITEM_SIZES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written. `constant` holds the values of a small one that the plan already knows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """A shard: file name and its tensors, in the order in which they will be written."""

    file: str
    tensors: tuple[StoredTensor, ...]

    def in_file_order(self) -> tuple[StoredTensor, ...]:
        """The order of the data in the file.

        Readers view tensors in place, so each must start at a multiple of its item size, and the format
        allows no gaps. Writing order has that property for every real model; where it has not, larger
        items go first, as the safetensors library does it.
        """
        offset = 0
        for tensor in self.tensors:
            if offset % ITEM_SIZES[tensor.dtype]:
                return tuple(sorted(self.tensors, key=lambda t: -ITEM_SIZES[t.dtype]))
            offset += tensor.nbytes
        return self.tensors

    def header(self) -> bytes:
        """The safetensors header: length, JSON, and spaces up to a multiple of eight bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.in_file_order():
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(t.nbytes for t in self.tensors)


class TensorSink(Protocol):
    """Where quantized rows go."""

    def write_rows(self, name: str, rows: torch.Tensor) -> None:
        """Append rows to a tensor; the rows of one tensor come in order."""

    def close(self) -> dict[str, str]:
        """Finish; returns the SHA-256 of every shard by file name."""


class _OpenShard:
    """The shard being written: an appending file, its running hash, and rows that came before their turn."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self._file = BlockWriter(path)
        self._hash = hashlib.sha256()
        self._order = layout.in_file_order()
        self._turn = 0
        self._written = 0  # bytes of the tensor whose turn it is
        self._waiting: dict[str, list[memoryview]] = {t.name: [] for t in self._order}
        self._emit(memoryview(layout.header()))

    def write(self, name: str, data: memoryview) -> None:
        self._waiting[name].append(data)
        while self._turn < len(self._order):
            current = self._order[self._turn]
            for piece in self._waiting[current.name]:
                self._emit(piece)
                self._written += piece.nbytes
            self._waiting[current.name].clear()
            if self._written < current.nbytes:
                return
            if self._written > current.nbytes:
                raise AssertionError(f"{current.name} got {self._written} bytes, not {current.nbytes}")
            self._turn += 1
            self._written = 0

    def _emit(self, data: memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    @property
    def complete(self) -> bool:
        return self._turn == len(self._order)

    def finish(self) -> str:
        """Returns the SHA-256 of the file, which is on the disk."""
        self._file.finish()
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


class ShardedSink:
    """Writes the shards of a plan into `folder`, one after the other.

    Args:
        folder: an existing folder.
        shards: what will be written, in writing order.
        finished: shards that are whole already, with their SHA-256; rows for them are not expected.
        on_shard: called with file name and SHA-256 when a shard is whole and on disk.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardLayout],
        *,
        finished: Mapping[str, str] | None = None,
        on_shard: Callable[[str, str], None] = lambda file, sha256: None,
    ) -> None:
        self._folder = folder
        self._hashes = dict(finished or {})
        self._on_shard = on_shard
        self._todo = [shard for shard in shards if shard.file not in self._hashes]
        self._needed = sum(shard.nbytes for shard in self._todo)
        self._current: _OpenShard | None = None

    def write_rows(self, name: str, rows: torch.Tensor) -> None:
        """Append `rows` (any shape of the right byte count) to tensor `name`.

        Raises:
            OutputError: the disk is full or refuses to write.
            VerificationError: the file does not read back as it was written.
        """
        import torch

        data = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            shard = self._current or self._start()
            shard.write(name, data)
            if shard.complete:
                self._finish(shard)
        except OSError as error:
            raise write_error(self._folder, error, self._needed) from None

    def _start(self) -> _OpenShard:
        layout = self._todo.pop(0)
        self._current = _OpenShard(self._folder / layout.file, layout)
        for tensor in layout.tensors:
            if tensor.constant is not None:
                self._current.write(tensor.name, _constant_bytes(tensor))
        return self._current

    def _finish(self, shard: _OpenShard) -> None:
        self._hashes[shard.layout.file] = shard.finish()
        self._current = None
        self._on_shard(shard.layout.file, self._hashes[shard.layout.file])

    def close(self) -> dict[str, str]:
        """Finish; returns the SHA-256 of every shard by file name.

        Raises:
            AssertionError: rows are missing (a fault of the caller).
        """
        if self._current is not None or self._todo:
            raise AssertionError("the sink was closed before every tensor was whole")
        return dict(self._hashes)

    def abandon(self) -> None:
        """Close files without finishing them."""
        if self._current is not None:
            self._current.close()
            self._current = None


def _constant_bytes(tensor: StoredTensor) -> memoryview:
    size = ITEM_SIZES[tensor.dtype]
    assert tensor.constant is not None
    return memoryview(b"".join(v.to_bytes(size, "little", signed=True) for v in tensor.constant))
