"""The judge: stock transformers with the weights that glmquant reads in a checkpoint.

An engine rounds more than the judge, which computes in float32, so two tokens that are almost equally likely may
change places. That must not derail the rest: the judge reads the engine's own text and, at every step, asks whether
the engine's token was the likeliest one *to within what rounding can do* (`limits`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GlmConfig, GlmForCausalLM, logging

from glmquant import families, formats
from glmquant.checkpoint.source import open_folder

from .base import Answer
from .damage import Damage

_CLEAR_SHARE = 0.25  # with fewer, hardly anything would have been compared


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


def limits(dtype: str) -> tuple[float, float]:
    """The largest gap of logits and the largest mean error of log-probabilities that rounding in `dtype` explains.

    The stand-in's highest logits are about 40, where neighbouring numbers are 32 eps apart: 1/4 in bfloat16, 1/32 in
    float16. A gap is the error of two logits, so it may be two such steps; a log-probability is off by less than half
    of one on average. (Measured with vLLM on CPU: gaps of 0.23 and 0.03, mean errors of 0.04 and 0.005.) In float32
    only the order of sums differs, and the judge is no better than the engine: a thousandth.
    """
    spacing = 32 * torch.finfo(getattr(torch, dtype)).eps
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
    for (name, ours), (same, theirs) in zip(weights(folder), weights(source), strict=True):
        assert name == same
        worst = max(worst, ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item())
    return worst


class Judge:
    """Transformers' model in float32 with the weights of `folder`, whichever layout the checkpoint has.

    Args:
        folder: what ``convert`` wrote.
        answer: of the engine that loaded it.
        activations: where the engine rounds activations to 8 bits: the columns that share a scale, 0 for a whole token;
            None if it does not.
    """

    def __init__(self, folder: Path, answer: Answer, activations: int | None = None) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        config = open_folder(folder).config
        native = families.detect(config).native_config
        assert native is not None
        settings = {key: value for key, value in native(config).items() if key != "quantization_config"}
        self._model = GlmForCausalLM.from_pretrained(
            None, config=GlmConfig(**settings), state_dict=dict(weights(folder)), dtype=torch.float32
        ).eval()
        self._folder, self._answer = folder, answer
        self._texts = [torch.tensor([*text.prompt, *text.tokens]) for text in answer.continuations]
        self._limits = self._measured_limits(activations)

    def verdict(self, damage: Damage | None = None) -> Verdict:
        """Compare what the engine said with what it should say.

        Args:
            damage: done to the judge's weights first; they stay so.
        """
        if damage is not None:
            parameters = dict(self._model.named_parameters())
            with torch.inference_mode(False), torch.no_grad():
                for name, values in weights(self._folder, damage, only_damaged=True):
                    parameters[name].copy_(values)
        gaps, margins, errors = [], [], []
        for text, ids, logits in zip(self._answer.continuations, self._texts, self._logits(), strict=True):
            theirs = logits.gather(1, ids[1:, None])[:, 0]
            stated = torch.tensor(text.logprobs)
            errors.append(((theirs - logits.logsumexp(-1))[-len(stated) :] - stated).abs())
            steps = slice(len(text.prompt) - 1, None)
            best, second = self._possible(logits[steps]).topk(2).values.unbind(-1)
            gaps.append(best - theirs[steps])
            margins.append(best - second)
        gap_limit, error_limit = self._limits
        gap, margin = torch.cat(gaps), torch.cat(margins)
        return Verdict(
            steps=len(gap),
            clear=int((margin > gap_limit).sum()),
            gap=gap.max().item(),
            gap_limit=gap_limit,
            error=torch.cat(errors).mean().item(),
            error_limit=error_limit,
        )

    def _logits(self) -> list[Tensor]:
        """For every text, after each of its tokens but the last."""
        with torch.inference_mode():  # zeros after the shorter texts: nothing before them sees them
            batch = self._model(pad_sequence(self._texts, batch_first=True)).logits
        return [padded[: len(ids) - 1] for ids, padded in zip(self._texts, batch, strict=True)]

    def _possible(self, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor(self._answer.banned, dtype=torch.long), -torch.inf)

    def _measured_limits(self, activations: int | None) -> tuple[float, float]:
        """`limits`, and what rounding activations to 8 bits adds to them.

        How much that is depends on the weights, so the judge rounds as the engine does, and looks how far its own
        logits move. The engine's move as far, but not the same way: whatever else it rounds pushes some activations
        over the edge to the next of 255 steps, and after a few layers the two have little to do with each other. So
        the margin between the two likeliest tokens may be off by four standard deviations of what it moved here (more
        once in 16 thousand steps, if the error were normal), and log-probabilities on average by one and a half times
        what they moved on average here. (Measured: 0.8 to 0.9 times.)
        """
        gap, error = limits(self._answer.dtype)
        if activations is None:
            return gap, error
        exact = self._logits()
        layers = [module for name, module in self._model.named_modules() if name.endswith("_proj")]
        hooks = [layer.register_forward_pre_hook(partial(_rounded, activations)) for layer in layers]
        rounded = self._logits()
        for hook in hooks:
            hook.remove()
        margins, moves = [], []
        for ids, one, other in zip(self._texts, exact, rounded, strict=True):
            top = self._possible(one).topk(2).indices
            margins.append((one - other).gather(1, top).diff(dim=1))
            chosen = ids[1:, None]
            moves.append((one.log_softmax(-1) - other.log_softmax(-1)).gather(1, chosen).abs())
        moved = torch.cat(margins).square().mean().sqrt().item()
        return gap + 4 * moved, error + 1.5 * torch.cat(moves).mean().item()


def _rounded(columns: int, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Activations on a symmetric grid of 8 bits, with a scale for every `columns` of a token, or for all of them."""
    (whole,) = inputs
    blocks = whole.unflatten(-1, (-1, columns or whole.shape[-1]))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / step).round().mul(step).flatten(-2),)


def weights(
    folder: Path, damage: Damage | None = None, *, only_damaged: bool = False
) -> Iterator[tuple[str, Tensor]]:
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
        stored = None
        if weight is None:
            whole = source.read(spec.name).float()
        else:
            stored = formats.read_rows(source, fmt, weight, 0, weight.shape[0])
            whole = stored.dequantize()
        damaged = damage(spec.name, stored, whole) if damage else whole
        if only_damaged and damaged is whole:
            continue
        for part in spec.native:
            yield part.name, damaged[part.start : part.stop]
