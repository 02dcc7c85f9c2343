"""Golden models to run: those in tests/golden, and where the reference data lie beside the repository, all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GLMQUANT_SHARED", REPOSITORY.parent / "shared"))
ROOTS = (REPOSITORY / "tests/golden", SHARED / "golden")

LATER = (
    "chatglm2-6b/tiny", "chatglm3-6b/tiny", "chatglm3-6b/tiny-wide", "chatglm3-6b-32k/tiny", "glm-4-9b-chat/tiny",
    "glm-4-9b-chat/tiny-wide",
)  # fmt: skip
LATER_QUANTIZED = (
    "chatglm2-6b/tiny-int4", "chatglm2-6b/tiny-int8", "chatglm3-6b/tiny-int4", "chatglm3-6b/tiny-int8",
)  # fmt: skip
FIRST = ("chatglm-6b/tiny-3l", "chatglm-6b/tiny-28l")
FIRST_QUANTIZED = tuple(f"chatglm-6b/tiny-3l-{kind}" for kind in ("int4", "int8", "int4-embeddings"))


def golden(name: str, *needs: str) -> Path:
    """The folder of a golden model that holds the files `needs` too; skips the test where there is none."""
    for root in ROOTS:
        folder = root / name
        if all((folder / file).exists() for file in ("config.json", *needs)):
            return folder
    pytest.skip(f"{name} with {', '.join(needs) or 'config.json'} is not in tests/golden, nor below {SHARED}")


def expected(name: str) -> tuple[Path, dict[str, Tensor]]:
    """A golden model in one safetensors file, and what THUDM's code computed with it."""
    folder = golden(name, "model.safetensors", "expected.safetensors")
    return folder, load_file(folder / "expected.safetensors")


def generated(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of greedy generation that go with a golden model."""
    runs: dict[str, dict[str, Any]] = json.loads((folder / "generate.json").read_text())
    return runs


@torch.inference_mode()
def largest_difference(found: Tensor, wanted: Tensor, real: Tensor | None = None) -> float:
    """Largest absolute difference of logits [batch, seq, vocab], at the `real` positions [batch, seq] only."""
    difference = (found.float() - wanted.float()).abs().amax(-1)
    return float(difference.max() if real is None else difference[real.bool()].max())


def greedy(model: Any, ids: Tensor, **options: Any) -> Any:
    """Greedy generation as the golden runs were made; `options` as for ``generate``."""
    return model.generate(
        ids,
        **{
            "max_length": None, "max_new_tokens": 16, "do_sample": False, "top_p": None, "temperature": None, **options
        },
    )  # fmt: skip
