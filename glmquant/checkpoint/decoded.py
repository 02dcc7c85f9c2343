"""A quantized checkpoint seen as the 16-bit one it stands for, so that it can be converted from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..families import Dims, Family
from .source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

    from ..formats import Format

_QUANTIZATION_KEYS = ("quantization_bit", "quantization_embeddings", "quantization_config")


class DecodedSource:
    """Wraps a `TensorSource` whose weights are stored in `fmt`; `read` dequantizes rows to half.

    Only for formats that store a matrix row by row.
    """

    def __init__(self, source: TensorSource, fmt: Format, family: Family, dims: Dims) -> None:
        self._source, self._format = source, fmt
        self._weights = {w.name: w for w in fmt.quantized(source.config, family, dims)}

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
        for name, weight in self._weights.items():
            expected = self._format.outputs(name, weight.shape, weight.scheme)
            for tensor in expected:
                found = stored.get(tensor.name)
                if found is None:
                    raise SourceError(
                        f"{self.folder} says it is quantized ({self._format.name}) but lacks {tensor.name}."
                    )
                if found.shape != tensor.shape or (tensor.dtype[0] == "I" and found.dtype != tensor.dtype):
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
        for name, parts in self._stored.items():
            infos[name] = TensorInfo(name, "F16", self._weights[name].shape, stored[parts[0]].shard)
        return infos

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource`."""
        import torch

        if name not in self._weights:
            return self._source.read(name, start, stop)
        rows = {part: self._source.read(part, start, stop) for part in self._stored[name]}
        return self._format.decode(rows, self._weights[name]).dequantize().to(torch.float16)

    def prefetch(self, shard: str) -> None:
        """See `TensorSource`."""
        self._source.prefetch(shard)

    def release(self, shard: str) -> None:
        """See `TensorSource`."""
        self._source.release(shard)
