"""From what a user typed to a source of 16-bit weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import families, formats, hub
from .checkpoint.adapter import AdapterSource
from .checkpoint.decoded import DecodedSource
from .checkpoint.source import TensorSource, open_folder
from .errors import QuantizedSourceError
from .formats import Format

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenedSource:
    """A source of 16-bit weights, and how they were stored."""

    source: TensorSource
    folder: Path
    stored_as: Format
    adapter: Path | None


def open_source(ref: PathLike, adapter: PathLike | None = None) -> OpenedSource:
    """Open a checkpoint for conversion, decoding THUDM's INT4 / INT8 and merging `adapter` on the way.

    Raises:
        SourceError: it is no sound checkpoint of a known family.
        QuantizedSourceError: it is quantized in a way that cannot be converted from.
    """
    folder = hub.resolve(ref).folder
    source = open_folder(folder)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    stored_as = formats.detect(source.config)
    if stored_as.name == "cpm":
        source = DecodedSource(source, stored_as, family, dims)
    elif stored_as.name != "safetensors":
        raise QuantizedSourceError(
            f"{folder} is quantized already ({stored_as.name}); convert from its 16-bit original. "
            "(THUDM's INT4 and INT8 checkpoints can be converted from.)"
        )
    if adapter is not None:
        source = AdapterSource(source, Path(adapter).expanduser(), family, dims)
    return OpenedSource(
        source, folder, stored_as, Path(adapter).expanduser() if adapter is not None else None
    )
