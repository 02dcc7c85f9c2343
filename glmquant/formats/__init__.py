"""The file formats by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import QuantizedSourceError, UsageError
from .base import Abilities, Format, StoredWeight, resolve_scheme
from .compressed_tensors import CompressedTensors
from .cpm import Cpm
from .plain import Plain

__all__ = [
    "FORMATS", "Abilities", "CompressedTensors", "Cpm", "Format", "Plain", "StoredWeight", "detect", "get",
    "resolve_scheme",
]  # fmt: skip

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "cpm": Cpm(),
    "safetensors": Plain(),
}


def get(name: str) -> Format:
    """The format called `name`; `UsageError` lists those there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UsageError(f"format {name!r} is not known; use {', '.join(FORMATS)}.") from None


def detect(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this ``config.json``.

    Raises:
        QuantizedSourceError: it is quantized in a way that glmquant does not know.
    """
    for candidate in FORMATS.values():
        if candidate.detect(config):
            return candidate
    section = config.get("quantization_config")
    found = section if isinstance(section, Mapping) else {}
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"  # which did not name itself in its first years
    how = f"with {method}" if method else f"in an unknown way (quantization_config {section!r})"
    raise QuantizedSourceError(
        f"config.json says that the checkpoint is quantized {how}, which glmquant cannot read; "
        "use its 16-bit original."
    )
