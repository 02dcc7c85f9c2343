"""What a checkpoint is, from its headers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import families, formats
from ._open import PathLike, open_described
from .checkpoint.decoded import DecodedSource
from .families import Dims, Role

_CACHE_BYTES = 2  # of one number in a 16-bit KV cache


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found out.

    Attributes:
        folder: the checkpoint.
        model: the published model it looks like.
        family: key of its family.
        layout: ``original`` (THUDM's names) or ``native`` (transformers' names).
        format: how weights are stored; ``safetensors`` for 16 or 32 bit ones.
        schemes: quantization schemes, with the number of weights that have each.
        dims: sizes of the model.
        files: bytes by weight file.
        dtypes: bytes by stored dtype.
        parameters: weights of the model, quantized ones counted once.
    """

    folder: Path
    model: str
    family: str
    layout: str
    format: str
    schemes: dict[str, int]
    dims: Dims
    files: dict[str, int]
    dtypes: dict[str, int]
    parameters: int

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: what the weights take in memory when they stay as they are."""
        return sum(self.dtypes.values())

    def cache_bytes(self, context: int) -> int:
        """Bytes of a 16-bit KV cache for one sequence of `context` tokens:
        2 (K and V) * layers * KV heads * head size * context * 2.
        """
        d = self.dims
        return 2 * d.layers * d.kv_heads * d.head_dim * context * _CACHE_BYTES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        context = self.dims.context
        return {
            "folder": str(self.folder),
            "model": self.model,
            "family": self.family,
            "layout": self.layout,
            "format": self.format,
            "schemes": self.schemes,
            "layers": self.dims.layers,
            "hidden": self.dims.hidden,
            "heads": self.dims.heads,
            "kv_heads": self.dims.kv_heads,
            "head_dim": self.dims.head_dim,
            "ffn": self.dims.ffn,
            "vocabulary": self.dims.vocab,
            "context": context,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "files": self.files,
            "kv_cache_bytes": {str(context): self.cache_bytes(context)},
        }


def inspect(ref: PathLike) -> Inspection:
    """Describe a checkpoint from its config and headers; no weight is read.

    Raises:
        SourceError: it is no checkpoint of a known family, or a damaged one.
    """
    source = open_described(ref)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    fmt = formats.detect(source.config)
    dtypes: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for info in source.infos().values():
        dtypes[info.decoded or info.dtype] += info.nbytes
        files[info.shard] += info.nbytes
    quantized = fmt.quantized(source.config, family, dims)
    if quantized:
        DecodedSource(
            source, fmt, family, dims
        ).infos()  # says where the weights are not what config.json states
    schemes = Counter(str(weight.scheme) for weight in quantized)
    schemes.update(info.decoded for info in source.infos().values() if info.decoded)
    layout = family.layout_of(source.config)
    stored = set(source.infos()) | {weight.name for weight in quantized}
    parameters = sum(
        math.prod(tensor.shape)
        for tensor in family.in_layout(dims, layout)
        if tensor.role is not Role.BUFFER and tensor.name in stored
    )
    return Inspection(
        folder=source.folder,
        model=family.describe(source.config),
        family=family.name,
        layout=layout,
        format=fmt.name,
        schemes=dict(schemes),
        dims=dims,
        files=dict(sorted(files.items())),
        dtypes=dict(sorted(dtypes.items())),
        parameters=parameters,
    )
