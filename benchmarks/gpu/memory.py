"""What `glmquant.memory` predicts against what a run on the GPU takes: torch's peak, and the process by NVML."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import glmquant
from glmquant import Recipe, check

from .. import synthetic

_LAYERS = 8  # of ChatGLM3-6B: the whole model has more of the same
_RECIPES = {"16 bit": None, "int4 g128": Recipe(), "int8 g128": Recipe(bits=8)}
_WORKLOADS = ((2048, 1), (8192, 1), (1024, 8))  # context, batch
_LIMIT = 0.03  # of torch's peak
_NO_LIMIT = 1 << 50


def predictions() -> list[dict[str, Any]]:
    """Predicted and measured bytes for every checkpoint; INT4 with every workload, the others with the first."""
    folder = Path(tempfile.mkdtemp(prefix="glmquant-gpu-memory-"))
    try:
        source = synthetic.build(folder / "source", layers=_LAYERS)
        rows = []
        for name, recipe in _RECIPES.items():
            out = (
                source if recipe is None else glmquant.convert(source, folder / "out", recipe, force=True).out
            )
            for context, batch in _WORKLOADS if name.startswith("int4") else _WORKLOADS[:1]:
                rows.append({"checkpoint": name, **_compare(out, context, batch)})
        return rows
    finally:
        shutil.rmtree(folder)


def _compare(folder: Path, context: int, batch: int) -> dict[str, Any]:
    found = check(folder, memory_limit=_NO_LIMIT, context=context, batch=batch, device="cuda", measure=True)
    errors = found.prediction_error
    return {
        "context": context,
        "batch": batch,
        "predicted_allocated": found.memory.allocated,
        "predicted_process": found.memory.peak,
        **{f"measured_{key}": value for key, value in (found.measured or {}).items()},
        "error_allocated": errors.get("allocated"),
        "error_process": errors.get("process"),
        "within_3_percent": abs(errors["allocated"]) <= _LIMIT if "allocated" in errors else None,
    }
