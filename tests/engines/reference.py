"""The judge: stock transformers with the weights that glmquant reads in a checkpoint.

An engine rounds more than the judge, which computes in float32, so two tokens that are almost equally likely may
change places. That must not derail the rest: the judge reads the engine's own text and, at every step, asks whether
the engine's token was the likeliest one *to within what rounding can do* (`limits`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GlmConfig, GlmForCausalLM, logging

from glmquant import families, formats
from glmquant.checkpoint.source import open_folder

from .base import Answer
from .damage import Damage

_CLEAR_SHARE = 0.5


@dataclass(frozen=True)
class Verdict:
    """How far an engine is from the judge.

    Attributes:
        steps: tokens that the engine chose.
        clear: those at which the judge's two likeliest logits are further apart than `gap_limit`.
        gap: the largest difference between the judge's highest logit and that of the engine's token.
        error: mean absolute difference of log-probabilities, over prompts and text.
    """

    steps: int
    clear: int
    gap: float
    gap_limit: float
    error: float
    error_limit: float

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        found = []
        if not self.gap <= self.gap_limit:  # also true of NaN
            found.append(
                f"a token whose logit is {self.gap:.4f} below the best ({self.gap_limit:.4f} is rounding)"
            )
        if not self.error <= self.error_limit:
            found.append(
                f"log-probabilities off by {self.error:.4f} on average ({self.error_limit:.4f} is rounding)"
            )
        if self.clear < _CLEAR_SHARE * self.steps:
            found.append(f"only {self.clear} of {self.steps} steps can be judged")
        return found

    def __str__(self) -> str:
        return (
            f"{self.clear} of {self.steps} clear, gap {self.gap:.4f} of {self.gap_limit:.4f}, "
            f"error {self.error:.4f} of {self.error_limit:.4f}"
        )


def limits(dtype: str, dynamic: bool = False) -> tuple[float, float]:
    """The largest gap of logits and the largest mean error of log-probabilities that rounding in `dtype` explains.

    The stand-in's highest logits are about 40, where neighbouring numbers are 32 eps apart: 1/4 in bfloat16, 1/32 in
    float16. A gap is the error of two logits, so it may be two such steps; a log-probability is off by less than half
    of one on average. (Measured with vLLM on CPU: gaps of 0.23 and 0.03, mean errors of 0.04 and 0.005.) In float32
    only the order of sums differs, and the judge is no better than the engine: a thousandth.

    Activations that are rounded to 8 bits (`dynamic`) are off by about 1/250 of their size in every matrix, as much as
    in bfloat16, and once more for its sums; twice its limits are allowed.
    """
    spacing = 32 * torch.finfo(getattr(torch, dtype)).eps
    if dynamic:
        spacing = max(spacing, 2 * 32 * torch.finfo(torch.bfloat16).eps)
    return max(2 * spacing, 1e-3), max(spacing / 2, 1e-3)


def packed_bytes(folder: Path) -> int:
    """Bytes of the quantized matrices in `folder`, without scales."""
    source = open_folder(folder)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    stored = formats.detect(source.config).quantized(source.config, family, dims)
    return sum(weight.shape[0] * weight.shape[1] * weight.scheme.bits for weight in stored) // 8


def drift(source: Path, folder: Path) -> float:
    """How far the weights in `folder` are from those that were converted: the largest relative error of any tensor.

    Engine and judge read the same files. Were these wrong, they might agree all the same.
    """
    worst = 0.0
    for (name, ours), (same, theirs) in zip(_weights(folder), _weights(source), strict=True):
        assert name == same
        worst = max(worst, ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item())
    return worst


def judge(folder: Path, answer: Answer, damage: Damage | None = None, *, dynamic: bool = False) -> Verdict:
    """Compare what an engine said about the checkpoint in `folder` with what it should say.

    Args:
        folder: what ``convert`` wrote.
        answer: of the engine.
        damage: done to the judge's weights first.
        dynamic: the engine rounds activations to 8 bits.
    """
    texts = [torch.tensor([*text.prompt, *text.tokens]) for text in answer.continuations]
    with torch.inference_mode():  # zeros after the shorter texts: nothing before them sees them
        batch = _load(folder, damage)(pad_sequence(texts, batch_first=True)).logits
    gaps, margins, errors = [], [], []
    for text, ids, padded in zip(answer.continuations, texts, batch, strict=True):
        logits = padded[: len(ids) - 1]
        theirs = logits.gather(1, ids[1:, None])[:, 0]
        stated = torch.tensor(text.logprobs)
        errors.append(((theirs - logits.logsumexp(-1))[-len(stated) :] - stated).abs())
        steps = slice(len(text.prompt) - 1, None)
        possible = logits[steps].index_fill(1, torch.tensor(answer.banned, dtype=torch.long), -torch.inf)
        best, second = possible.topk(2).values.unbind(-1)
        gaps.append(best - theirs[steps])
        margins.append(best - second)
    gap_limit, error_limit = limits(answer.dtype, dynamic)
    gap, margin = torch.cat(gaps), torch.cat(margins)
    return Verdict(
        steps=len(gap),
        clear=int((margin > gap_limit).sum()),
        gap=gap.max().item(),
        gap_limit=gap_limit,
        error=torch.cat(errors).mean().item(),
        error_limit=error_limit,
    )


def _load(folder: Path, damage: Damage | None) -> GlmForCausalLM:
    """Transformers' model in float32, whichever layout the checkpoint has."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = open_folder(folder).config
    native = families.detect(config).native_config
    assert native is not None
    settings = {key: value for key, value in native(config).items() if key != "quantization_config"}
    return GlmForCausalLM.from_pretrained(
        None, config=GlmConfig(**settings), state_dict=dict(_weights(folder, damage)), dtype=torch.float32
    ).eval()


def _weights(folder: Path, damage: Damage | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint under its native name, in float32, decoded by `glmquant.formats`."""
    source = open_folder(folder)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    fmt = formats.detect(source.config)
    quantized = {weight.name: weight for weight in fmt.quantized(source.config, family, dims)}
    for spec in family.tensors(dims):
        if not spec.native:
            continue
        weight = quantized.get(spec.name)
        if weight is None:
            whole = source.read(spec.name).float()
        else:
            tensor = formats.read_rows(source, fmt, weight, 0, weight.shape[0])
            whole = (damage(weight.name, tensor) if damage else tensor).dequantize()
        for part in spec.native:
            yield part.name, whole[part.start : part.stop]
