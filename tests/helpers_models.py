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
    """A golden model, and what THUDM's code computed with it. tests/golden has some models in shards only."""
    places = [root / name.replace("/", f"/{part}", 1) for root in ROOTS for part in ("", "expected/")]
    results = [place / "expected.safetensors" for place in places]
    forms = [root / name / form for root in ROOTS for form in ("", "bin-fp16", "safetensors-bf16")]
    models = [form for form in forms if list(form.glob("*model*.safetensors")) or list(form.glob("*.bin"))]
    found = next((file for file in results if file.exists()), None)
    if found is None or not models:
        pytest.skip(f"the weights of {name}, or what they give, are not in tests/golden, nor below {SHARED}")
    return models[0], load_file(found)


def generated(name: str, truth: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Runs of greedy generation: with stop ids too where generate.json is at hand, else the plain ones in `truth`."""
    for root in ROOTS:
        if (root / name / "generate.json").exists():
            runs: dict[str, dict[str, Any]] = json.loads((root / name / "generate.json").read_text())
            return runs
    plain = {}
    for case in ("single", "batch"):
        ids, whole = truth[f"{case}.input_ids"], truth[f"{case}.generate.sequences"]
        answers = whole[:, ids.shape[1] :].tolist()
        plain[case] = {"input_ids": ids.tolist(), "generated_ids": answers, "eos_token_id": None}
    return plain


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
