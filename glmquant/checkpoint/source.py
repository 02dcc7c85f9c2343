"""Reading checkpoints: headers first, then rows of one tensor at a time.

Everything is memory-mapped, so a tensor costs page cache and no memory of its own, and rows are views of the
file: treat them as read-only.
"""

from __future__ import annotations

import math
import pickle
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SourceError, UnsafeFileError
from .files import WeightFiles, find_weights, first_bytes, read_json

if TYPE_CHECKING:
    import torch

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "F32": "float32", "I64": "int64", "F64": "float64",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name such as ``BF16``."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header states it.

    Attributes:
        dtype: spelled as safetensors does (``F16``, ``I8``, ...).
        shard: the file it is in.
        decoded: what it is decoded from while it is read, such as ``Q4_K``; None if it is stored as it is.
        stored: bytes of what it is decoded from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    decoded: str | None = None
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return self.stored if self.stored is not None else math.prod(self.shape) * ITEM_SIZES[self.dtype]


class TensorSource(Protocol):
    """A checkpoint that can be read tensor by tensor, rows at a time; safe to use from several threads."""

    @property
    def folder(self) -> Path:
        """Where the files beside the weights (tokenizer, licences) are."""

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``, parsed."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights, in order; what a report identifies the source by."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, from headers alone."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start..stop`` of a tensor, not to be written to."""

    def prefetch(self, shard: str) -> None:
        """Make a shard's data likely to be near when it is read; returns at once."""

    def release(self, shard: str) -> None:
        """Say that no more of a shard will be read."""


class _FolderSource(ABC):
    """What safetensors and ``.bin`` folders have in common; subclasses open one shard."""

    def __init__(self, folder: Path, weights: WeightFiles) -> None:
        self.folder = folder
        self._weights = weights
        self._lock = threading.Lock()
        self._open: dict[str, Any] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / shard for shard in self._weights.shards)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for shard in self._weights.shards:
            for info in self._shard_infos(shard):
                stated = (self._weights.weight_map or {}).get(info.name, shard)
                if stated == shard:
                    found[info.name] = info
            self.release(shard)
        for name, shard in (self._weights.weight_map or {}).items():
            if name not in found:
                raise SourceError(
                    f"the index says that {name} is in {shard}, but that file does not hold it; "
                    "download the shard and its index again."
                )
        return found

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def prefetch(self, shard: str) -> None:
        """Nothing to do for a local file: the hashing pass of a conversion reads ahead of its work."""
        return

    def release(self, shard: str) -> None:
        with self._lock:
            self._open.pop(shard, None)

    def _handle(self, shard: str) -> Any:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = self._open_shard(self.folder / shard)
            return self._open[shard]

    @abstractmethod
    def _shard_infos(self, shard: str) -> list[TensorInfo]:
        """Headers of one shard."""

    @abstractmethod
    def _open_shard(self, path: Path) -> Any:
        """A handle from which rows are read."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource.read`."""


class SafetensorsSource(_FolderSource):
    """A folder with ``model.safetensors`` or its shards.

    The safetensors library checks headers: overlapping, negative or huge offsets and short files are refused
    when a shard is opened.
    """

    def _open_shard(self, path: Path, framework: str = "pt") -> Any:
        from safetensors import SafetensorError, safe_open

        first_bytes(path)
        try:
            return safe_open(path, framework=framework, device="cpu")
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{path} is not a sound safetensors file ({error}); download it again."
            ) from None

    def _shard_infos(self, shard: str) -> list[TensorInfo]:
        handle = self._open_shard(self.folder / shard, "np")  # headers do without torch, which takes a second
        infos = []
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            view = handle.get_slice(name)
            dtype = view.get_dtype()
            if dtype not in ITEM_SIZES:
                raise SourceError(f"{name} in {shard} has dtype {dtype}, which is not known here.")
            infos.append(TensorInfo(name, dtype, tuple(view.get_shape()), shard))
        return infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        info = self._infos[name]
        if not info.shape:
            whole: torch.Tensor = self._handle(info.shard).get_tensor(name)
            return whole
        view = self._handle(info.shard).get_slice(name)
        rows: torch.Tensor = view[start : info.shape[0] if stop is None else stop]
        return rows


class BinSource(_FolderSource):
    """A folder with ``pytorch_model.bin`` (zip format) or its shards.

    Read by ``torch.load`` with ``weights_only`` and ``mmap``: nothing in a pickle is executed, and only the
    rows in hand become resident.
    """

    def _open_shard(self, path: Path) -> dict[str, torch.Tensor]:
        return load_bin(path)

    def _shard_infos(self, shard: str) -> list[TensorInfo]:
        import torch

        names = {getattr(torch, value): key for key, value in TORCH_NAMES.items()}
        infos = []
        for name, tensor in self._handle(shard).items():
            if tensor.dtype not in names:
                raise SourceError(f"{name} in {shard} has dtype {tensor.dtype}, which is not known here.")
            infos.append(TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), shard))
        return infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._infos[name].shard)[name]
        # A pickle may hold views, for example a transpose; quantizers expect rows that lie one after the other.
        return (tensor[start:stop] if tensor.dim() else tensor).contiguous()


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a zip-format ``.bin`` file, mapped into memory.

    Raises:
        UnsafeFileError: its pickle asks for anything but tensors; nothing in it is executed.
        SourceError: it is damaged, or holds something else.
    """
    import torch

    if first_bytes(path)[:4] != b"PK\x03\x04":
        raise SourceError(
            f"{path} is not a zip-format torch file: it is damaged, or was written by torch before 1.6. "
            "Download it again, or use the safetensors files of the same model."
        )
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # Of torch's own message nothing is passed on: it tells the reader how to run the code after all.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafeFileError(
            f"{path} holds more than weights ({wanted[1] if wanted else 'an unknown instruction'}) and was refused; "
            "nothing in it was run. Use a safetensors version of the model."
        ) from None
    except Exception as error:  # a damaged pickle may end in anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise SourceError(f"{path} is damaged ({reason}); download it again.") from None
    content: dict[Any, Any] = tensors if isinstance(tensors, dict) else {None: tensors}
    for name, value in content.items():
        if not (isinstance(name, str) and _is_plain(value)):
            raise SourceError(
                f"{path} is not a plain dictionary of tensors (it holds a {type(value).__name__} called {name}); if "
                "it is a training checkpoint, save the model's state_dict and convert that."
            )
    return content


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with numbers in it: not sparse, not on the meta device."""
    import torch

    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def open_folder(folder: Path) -> TensorSource:
    """Open the checkpoint in `folder` by its headers.

    Raises:
        SourceError: see `find_weights`, `SafetensorsSource` and `BinSource`.
    """
    return _source(folder, find_weights(folder))


def open_shard(folder: Path, shard: str) -> TensorSource:
    """Open one shard of a checkpoint as if there were no other; `folder` need hold nothing else."""
    return _source(folder, WeightFiles((shard,), None))


def _source(folder: Path, weights: WeightFiles) -> TensorSource:
    if weights.shards[0].endswith(".gguf"):
        from .gguf import GgufSource

        return GgufSource(folder, weights)
    kind = SafetensorsSource if weights.shards[0].endswith(".safetensors") else BinSource
    return kind(folder, weights)
