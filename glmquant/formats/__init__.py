"""The file formats by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import QuantizedSourceError, UsageError
from ..recipe import Recipe
from .base import Abilities, Format, ModelFacts, StoredWeight, blocks, read_rows, resolve_scheme
from .bitsandbytes import Bitsandbytes
from .compressed_tensors import CompressedTensors
from .cpm import Cpm
from .gguf import Gguf
from .gptq import Gptq
from .plain import Plain

__all__ = [
    "FORMATS", "Abilities", "Bitsandbytes", "CompressedTensors", "Cpm", "Format", "Gguf", "Gptq", "ModelFacts", "Plain",
    "StoredWeight", "blocks", "detect", "get", "of", "read_rows", "resolve_scheme",
]  # fmt: skip

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "cpm": Cpm(),
    "gptq": Gptq(),
    "bitsandbytes": Bitsandbytes(),
    "gguf": Gguf(),
    "safetensors": Plain(),
}


def get(name: str) -> Format:
    """The format called `name`; `UsageError` lists those there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise UsageError(f"format {name!r} is not known; use {', '.join(FORMATS)}.") from None


def of(recipe: Recipe) -> Format:
    """The format of a recipe that has every choice made, in the variant that it asks for."""
    return get(str(recipe.format)).chosen(recipe)


def detect(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this ``config.json``.

    Raises:
        QuantizedSourceError: it is quantized in a way that glmquant does not know.
    """
    for candidate in FORMATS.values():
        if candidate.detect(config):
            return candidate.variant(config)
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
