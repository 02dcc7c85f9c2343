"""What the user asked for."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import UsageError

Group = int | Literal["row"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes from ``4GB`` (decimal), ``4GiB`` (binary) or a plain number.

    Raises:
        UsageError: not a size, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write for example 4GB, 3.5GiB or 500MB.")
    try:
        size = int(float(match[1]) * _UNITS[match[2]])
    except OverflowError:
        raise UsageError(f"{text[:20]}... is more than any disk holds.") from None
    if size <= 0:
        raise UsageError(f"the size {text!r} must be positive.")
    return size


@dataclass(frozen=True)
class Recipe:
    """What a conversion should do; None leaves the choice to the format (see `glmquant.formats`).

    Args:
        bits: 4, 8, or 16 for a change of layout only.
        group_size: columns that share a scale, or ``"row"``.
        symmetric: no zero points.
        method: ``rtn``, ``mse`` or ``thudm``.
        format: ``compressed-tensors``, ``cpm`` or ``safetensors``.
        layout: ``native`` (transformers' names, no remote code) or ``original`` (THUDM's names).
        quantize_head: the output head in 8 bit instead of 16.
        quantize_embeddings: the input embeddings in 8 bit instead of 16; in ``cpm``, for ChatGLM-6B only, embedding
            and head at `bits`.
        max_shard_size: upper limit of a file in bytes (a single tensor may exceed it).
    """

    bits: int = 4
    group_size: Group | None = None
    symmetric: bool = True
    method: str | None = None
    format: str | None = None
    layout: str | None = None
    quantize_head: bool = False
    quantize_embeddings: bool = False
    max_shard_size: int = 4 * 10**9

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise UsageError(f"--bits {self.bits} is not supported; use 4, 8 or 16.")
        if self.max_shard_size <= 0:
            raise UsageError("the shard size must be positive.")
        if self.layout not in (None, "native", "original"):
            raise UsageError(f"layout {self.layout!r} is not known; use native or original.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
