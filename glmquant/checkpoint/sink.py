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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .._hashing import feed
from .blocks import BlockWriter
from .output import write_error
from .source import ITEM_SIZES, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written.

    Attributes:
        name: in the file.
        dtype: as safetensors spells it.
        shape: of the whole tensor.
        constant: the values, where it is a small one that the plan already knows.
        axis: along which the rows of the weight lie; 1 where the tensor is transposed.
        per: rows of the weight that share one step along `axis`; 0 where all of them need the whole tensor.
        spread: steps along `axis` that a row of the weight takes.
        blocks: GGUF's name for the type of the blocks that the bytes are; None for numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    constant: tuple[float, ...] | None = None
    axis: int = 0
    per: int = 1
    spread: int = 1
    blocks: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """A shard: file name and its tensors, in the order in which they will be written."""

    file: str
    tensors: tuple[StoredTensor, ...]

    def tensor(self, name: str) -> StoredTensor:
        """The tensor called `name`."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

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


@dataclass(frozen=True)
class Begun:
    """The beginning of a shard that is whole up to the end of a tensor.

    Attributes:
        file: the shard's.
        nbytes: how much of it is there.
        hash: SHA-256 of that.
    """

    file: str
    nbytes: int
    hash: hashlib._Hash


def begun_shard(path: Path, nbytes: int, sha256: str) -> Begun | None:
    """What an interrupted run has written of a shard; None if it is not there as it was."""
    digest = hashlib.sha256()
    try:
        if nbytes <= 0 or path.stat().st_size < nbytes:
            return None
        with path.open("rb") as file:
            feed(digest, file, 0, nbytes)
    except OSError:
        return None
    return Begun(path.name, nbytes, digest) if digest.hexdigest() == sha256 else None


class TensorSink(Protocol):
    """Where quantized rows go."""

    def write_rows(self, name: str, rows: torch.Tensor) -> None:
        """Append rows to a tensor; the rows of one tensor come in order."""

    def close(self) -> dict[str, str]:
        """Finish; returns the SHA-256 of every shard by file name."""


class _OpenShard:
    """The shard being written: an appending file, its running hash, and rows that came before their turn."""

    def __init__(self, path: Path, layout: ShardLayout, begun: Begun | None = None) -> None:
        self.layout = layout
        self._file = BlockWriter(path, begun.nbytes if begun else 0)
        self._hash = begun.hash if begun else hashlib.sha256()
        self._order = layout.in_file_order()
        self._turn = 0
        self._written = 0  # bytes of the tensor whose turn it is
        self._waiting: dict[str, list[memoryview]] = {t.name: [] for t in self._order}
        if begun is None:
            self._emit(memoryview(layout.header()))
            return
        left = begun.nbytes - len(layout.header())
        while left > 0:
            left -= self._order[self._turn].nbytes
            self._turn += 1
        assert left == 0

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

    def is_written(self, name: str) -> bool:
        """Whether a tensor is in the file."""
        return any(tensor.name == name for tensor in self._order[: self._turn])

    def begun(self) -> tuple[int, str] | None:
        """Bytes that are on the disk for good, and their SHA-256; None while rows wait for their turn."""
        open_ones = (t for t in self._order[self._turn :] if t.constant is None)
        if self._written or any(self._waiting[tensor.name] for tensor in open_ones):
            return None
        self._file.flush()
        return self._file.size, self._hash.hexdigest()

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
        begun: the beginning of the first of the others, if it is there already.
        on_shard: called with file name and SHA-256 when a shard is whole and on disk.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardLayout],
        *,
        finished: Mapping[str, str] | None = None,
        begun: Begun | None = None,
        on_shard: Callable[[str, str], None] = lambda file, sha256: None,
    ) -> None:
        self._folder = folder
        self._hashes = dict(finished or {})
        self._on_shard = on_shard
        self._todo = [shard for shard in shards if shard.file not in self._hashes]
        self._needed = sum(shard.nbytes for shard in self._todo)
        self._begun = begun
        self._current: _OpenShard | None = None
        self._transposed: dict[str, _Transposed] = {}

    def write_rows(self, name: str, rows: torch.Tensor) -> None:
        """Append `rows` (any shape of the right byte count) to tensor `name`.

        A transposed tensor is kept until it is whole: the rows of its weight are columns, which lie all over the file.

        Raises:
            OutputError: the disk is full or refuses to write.
            VerificationError: the file does not read back as it was written.
        """
        import torch

        try:
            shard = self._current or self._start()
            if shard.layout.tensor(name).axis:
                columns = self._transposed.setdefault(name, _Transposed(shard.layout.tensor(name)))
                if not columns.add(rows):
                    return
                rows = self._transposed.pop(name).whole
            shard.write(name, memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            if shard.complete:
                self._finish(shard)
        except OSError as error:
            raise write_error(self._folder, error, self._needed) from None

    def _start(self) -> _OpenShard:
        layout = self._todo.pop(0)
        begun = self._begun if self._begun is not None and self._begun.file == layout.file else None
        self._current = _OpenShard(self._folder / layout.file, layout, begun)
        for tensor in layout.in_file_order():
            if tensor.constant is not None and not self._current.is_written(tensor.name):
                self._current.write(tensor.name, _constant_bytes(tensor))
        return self._current

    def _finish(self, shard: _OpenShard) -> None:
        self._hashes[shard.layout.file] = shard.finish()
        self._current = None
        self._on_shard(shard.layout.file, self._hashes[shard.layout.file])

    def begun(self) -> tuple[str, int, str] | None:
        """File, bytes and SHA-256 of what is on the disk of the shard being written, if an interrupted run could go on
        from there.

        Raises:
            OutputError: the disk is full or refuses to write.
        """
        if self._current is None or self._transposed:
            return None
        try:
            found = self._current.begun()
        except OSError as error:
            raise write_error(self._folder, error, self._needed) from None
        return (self._current.layout.file, *found) if found else None

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


class _Transposed:
    """A tensor that arrives column by column."""

    def __init__(self, tensor: StoredTensor) -> None:
        import torch

        self.whole = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        self._columns = 0

    def add(self, columns: torch.Tensor) -> bool:
        """Put the next `columns` in their place; returns whether the tensor is whole."""
        first, self._columns = self._columns, self._columns + columns.shape[1]
        self.whole[:, first : self._columns] = columns
        return self._columns == self.whole.shape[1]


def _constant_bytes(tensor: StoredTensor) -> memoryview:
    import torch

    values = torch.tensor(tensor.constant, dtype=torch_dtype(tensor.dtype))
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
