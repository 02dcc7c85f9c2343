"""A quantized checkpoint seen as the 16-bit one it stands for, so that it can be converted from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..families import Dims, Family, stated_dtype
from ..formats import Format, read_rows
from ..scheme import QuantizedTensor, Scheme
from .source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

_QUANTIZATION_KEYS = ("quantization_bit", "quantization_embeddings", "quantization_config")


def stored_scheme(source: TensorSource, name: str) -> Scheme | None:
    """How a tensor of `source` is quantized; None if it is not."""
    weight = source.weights.get(name) if isinstance(source, DecodedSource) else None
    return weight.scheme if weight else None


class DecodedSource:
    """Wraps a `TensorSource` whose weights are stored in `fmt`.

    Its headers are those of the 16-bit model; `read` gives the exact weights, in float32, of what is quantized.

    Attributes:
        weights: what is quantized, by name.
    """

    def __init__(self, source: TensorSource, fmt: Format, family: Family, dims: Dims) -> None:
        self._source, self._format = source, fmt
        self.weights = {w.name: w for w in fmt.quantized(source.config, family, dims)}

    @property
    def folder(self) -> Path:
        """See `TensorSource`."""
        return self._source.folder

    @property
    def files(self) -> tuple[Path, ...]:
        """See `TensorSource`."""
        return self._source.files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the 16-bit model."""
        config = self._source.config
        return {k: v for k, v in config.items() if k not in _QUANTIZATION_KEYS}

    @cached_property
    def _stored(self) -> dict[str, tuple[str, ...]]:
        """The stored tensors of every quantized weight; checks that they are there and as they should be."""
        stored = self._source.infos()
        names = {}
        for name, weight in self.weights.items():
            expected = self._format.outputs(name, weight.shape, weight.scheme)
            for tensor in expected:
                found = stored.get(tensor.name)
                if found is None:
                    raise SourceError(
                        f"{self.folder} says it is quantized ({self._format.name}) but lacks {tensor.name}."
                    )
                if found.shape != tensor.shape or (tensor.dtype[0] in "IU" and found.dtype != tensor.dtype):
                    raise SourceError(
                        f"{self.folder} says it is quantized ({self._format.name}, {weight.scheme}), but {tensor.name} "
                        f"in {found.shard} is {found.dtype} {list(found.shape)} and not {tensor.dtype} "
                        f"{list(tensor.shape)}; the weights and config.json do not belong together."
                    )
            names[name] = tuple(t.name for t in expected)
        return names

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        stored = self._source.infos()
        packed = {part for parts in self._stored.values() for part in parts}
        infos = {name: info for name, info in stored.items() if name not in packed}
        dtype = stated_dtype(self._source.config)
        for name, parts in self._stored.items():
            infos[name] = TensorInfo(name, dtype, self.weights[name].shape, stored[parts[0]].shard)
        return infos

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource`."""
        if name not in self.weights:
            return self._source.read(name, start, stop)
        return self.quantized(name, start, stop).dequantize()

    def quantized(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        """Rows of a quantized weight as they are stored."""
        weight, multiple = self.weights[name], self._format.row_multiple
        stop = weight.shape[0] if stop is None else stop
        first = start // multiple * multiple
        last = min(weight.shape[0], -(-stop // multiple) * multiple)
        rows = read_rows(self._source, self._format, weight, first, last)
        return rows if (first, last) == (start, stop) else rows.rows(start - first, stop - first)

    def prefetch(self, shard: str) -> None:
        """See `TensorSource`."""
        self._source.prefetch(shard)

    def release(self, shard: str) -> None:
        """See `TensorSource`."""
        self._source.release(shard)
