"""A GGUF file of a checkpoint, as ``convert`` writes it, for measuring llama.cpp on the same weights."""

from __future__ import annotations

from pathlib import Path

import glmquant
from glmquant import Recipe

_BITS = {"F16": 16, "Q4_0": 4, "Q8_0": 8}


def write(source: Path, out: Path, layers: str = "F16") -> Path:
    """Write the checkpoint in `source` into the folder `out`; returns the file in it.

    Args:
        source: a folder.
        out: left as it is if it is there.
        layers: type of the matrices of the layers: ``F16``, ``Q4_0``, ``Q8_0``. Embedding and output head are F16.
    """
    if not out.exists():
        bits = _BITS[layers]
        glmquant.convert(
            source, out, Recipe(bits=bits, format="gguf", method=None if bits == 16 else "rtn"), device="cpu"
        )
    return out / "model.gguf"
