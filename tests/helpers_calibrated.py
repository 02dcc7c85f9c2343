"""A small model with a tokenizer, texts to calibrate and to judge with, and how a conversion is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers_sources import CHATGLM2, write_model
from test_evaluate import TEXT, opinionated
from test_original_tokenizers_tiny import sentencepiece_folder
from torch import Tensor

import glmquant
from glmquant import Recipe
from glmquant._folding import Folds, effective, from_letters
from glmquant._open import open_source
from glmquant.checkpoint.output import REPORT
from glmquant.families import Role
from glmquant.families.chatglm2 import FAMILY
from glmquant.recipe import CALIBRATED, Calibration

WINDOW = 32


def two_texts(folder: Path) -> tuple[Path, Path]:
    """One to calibrate with, and another to evaluate on: the lines of a text in another order, other words in them."""
    words = TEXT.split()
    seen, unseen = folder / "seen.txt", folder / "unseen.txt"
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (2, 1200), generator=generator).tolist()
    for path, choice in zip((seen, unseen), order, strict=True):
        path.write_text(" ".join(words[number] for number in choice), encoding="utf-8")
    return seen, unseen


def chatglm3(folder: Path, outliers: float = 1.0) -> Path:
    """A random ChatGLM3; where norms, v and up are made unlike, some inputs are `outliers` times as large as others."""
    config = {**CHATGLM2, "padded_vocab_size": 512}
    tensors = opinionated(config)
    if outliers != 1:
        for name, tensor in tensors.items():
            rows = {"query_key_value": 128, "dense_h_to_4h": 256}.get(name.split(".")[-2], 0)
            if rows or "layernorm" in name:
                tensor[-rows:][::11] *= outliers
    sentencepiece_folder(folder, "chatglm3-6b")
    return write_model(folder, config, tensors)


def calibrated(method: str, text: Path, **options: Any) -> Recipe:
    """A recipe for small models; other methods are not given the text."""
    calibration = Calibration(str(text), windows=24, window=WINDOW) if method in CALIBRATED else None
    return Recipe(method=method, calibration=calibration, **options)


def divergence(out: Path, source: Path, text: Path) -> float:
    """Mean KL divergence."""
    return glmquant.evaluate(out, source, text, window=WINDOW, windows=12, device="cpu").kl_mean.value


@torch.no_grad()
def output_errors(out: Path, source: Path, text: Path) -> list[float]:
    """Of the linear layers but q, k and v: ``|(W - W')x|^2 / |Wx|^2`` on a text, x being what `source` gives them.

    Args:
        out: in the native layout; scales that it says have been moved are undone.
        source: made by `chatglm3`.
        text: that is read.
    """
    model = glmquant.load(source, "cpu", torch.float32)
    exact, made = open_source(source).source, open_source(out).source
    dims, folds = FAMILY.dims(exact.config), Folds()
    letters = json.loads((out / REPORT).read_text()).get("calibration", {}).get("folded", [])
    for fold, found in zip(FAMILY.folds(dims), letters, strict=False):
        gain = exact.read(fold.giver.name)
        folds.add(fold, effective(fold, from_letters(found), gain, torch.float16))
    inputs: dict[str, Tensor] = {}
    specs = [spec for spec in FAMILY.tensors(dims) if spec.role is Role.LINEAR and len(spec.native) == 1]
    for spec in specs:
        model.get_submodule(spec.native[0].name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, x, name=spec.name: inputs.update({name: x[0].flatten(0, 1)})
        )
    model(glmquant.load_tokenizer(source)(text.read_text()[:800], return_tensors="pt").input_ids)
    errors = []
    for spec in specs:
        weight = exact.read(spec.name).float()
        found = made.read(spec.native[0].name).float() * (weight / folds.apply(spec.name, weight)).nan_to_num(
            1
        )
        wanted = inputs[spec.name] @ weight.t()
        lost = inputs[spec.name] @ found.t() - wanted
        errors.append(float(lost.square().sum() / wanted.square().sum()))
    return errors
