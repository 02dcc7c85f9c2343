"""How much a quantized model differs from its source, measured on text.

Both models run block by block (`glmquant.models.blocks`), one after the other, and meet only in their output heads. So
memory holds one block, two heads, and for every window of the text what the two models have made of it, which is
[window, hidden] each: neither model is ever whole in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ._open import PathLike
from ._windows import SAMPLE, Windows, cut, read_text
from .errors import UsageError
from .models.blocks import BlockwiseModel
from .models.building import Checkpoint, open_checkpoint
from .models.loading import compute_dtype
from .tokenizers.loading import load_tokenizer

Progress = Callable[[int, int, str], None]

_LOGITS = 1 << 23  # logits of one model that are looked at together
_RESAMPLES = 200
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, from how much the windows of the text differ; None with one window."""

    value: float
    error: float | None

    @classmethod
    def mean(cls, by_window: Tensor) -> Estimate:
        """The mean of the windows' own means [windows]."""
        count = len(by_window)
        return cls(float(by_window.mean()), float(by_window.std() / count**0.5) if count > 1 else None)

    def exp(self) -> Estimate:
        """The same for the exponential, to first order."""
        value = float(torch.tensor(self.value, dtype=torch.float64).exp())
        return Estimate(value, None if self.error is None else value * self.error)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        out: the folder that was judged.
        source: what it was held against.
        text: the file, or the name of the bundled sample.
        windows: how many there were.
        window: tokens of each, with the `prefix` special tokens in front.
        prefix: see `window`.
        stride: tokens of text between the starts of two windows.
        predictions: tokens that were predicted, in all.
        dtype: what both models computed in.
        device: and where.
        source_perplexity: exp of the mean negative log-likelihood of a token.
        perplexity: that of `out`.
        perplexity_ratio: of `out` to the source; its error is small, since both read the same windows.
        kl_mean: KL(source || out) of the distributions of the next token, in nats.
        kl_p99: what 99 % of the tokens stay below; its error is that of resampled windows.
        top1_agreement: how often both hold the same token for the likeliest.
    """

    out: str
    source: str
    text: str
    windows: int
    window: int
    prefix: int
    stride: int
    predictions: int
    dtype: str
    device: str
    source_perplexity: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def evaluate(
    out: PathLike,
    source: PathLike,
    text: PathLike | None = None,
    *,
    second_half: bool = False,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    device: torch.device | str | int = "auto",
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Hold the model in the folder `out` against the one it was made from.

    The same numbers come out again on the same machine, with the same number of threads and the same versions.

    Args:
        out: any folder that `glmquant.load` loads.
        source: the 16-bit original; any folder here too.
        text: UTF-8 file; None is a bundled sample of WikiText-2.
        second_half: use only the second half of `text`, where the first has served for calibration.
        window: tokens a model sees at a time; see `glmquant._windows.cut` for what a window is.
        stride: tokens of text from one window to the next; None lets windows not overlap.
        windows: at most so many of them, from the start of the text; None takes all.
        device: where to compute, ``auto`` is the first GPU if there is one.
        dtype: what both models compute in. None is float32 on a CPU, else what the source's config.json states.
        progress: called with blocks done, blocks in all, and the name of the last one.

    Raises:
        SourceError: a folder is no model, or the text cannot be read.
        UsageError: the text is shorter than a window, or the two have different tokenizers or vocabularies.
        ModelError: a model computes NaN or infinity; says which, and where.
    """
    source_checkpoint, out_checkpoint = open_checkpoint(source), open_checkpoint(out)
    _check_alike(source_checkpoint, out_checkpoint, window)
    cut_text = _windows(source, out, read_text(text, second_half), (window, stride, windows))
    if dtype is None and _is_cpu(device):
        dtype = torch.float32
    computed_in = compute_dtype(dtype, source_checkpoint)
    models = [BlockwiseModel(c, computed_in, device) for c in (source_checkpoint, out_checkpoint)]
    total, done = sum(model.blocks for model in models), 0

    def report(name: str, count: int = 1) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, name)

    states = [model.hidden_states(cut_text.ids, report) for model in models]
    loss, divergence, same = _compare(models, states, cut_text)
    report("heads", len(models))
    return Evaluation(
        out=os.fspath(out),
        source=os.fspath(source),
        text=SAMPLE if text is None else os.fspath(text),
        windows=len(cut_text.ids),
        window=window,
        prefix=cut_text.prefix,
        stride=cut_text.stride,
        predictions=divergence.numel(),
        dtype=str(computed_in).removeprefix("torch."),
        device=str(models[0].device),
        source_perplexity=Estimate.mean(loss[0].mean(-1)).exp(),
        perplexity=Estimate.mean(loss[1].mean(-1)).exp(),
        perplexity_ratio=Estimate.mean((loss[1] - loss[0]).mean(-1)).exp(),
        kl_mean=Estimate.mean(divergence.mean(-1)),
        kl_p99=_quantile(divergence, 0.99),
        top1_agreement=Estimate.mean(same.mean(-1)),
    )


def _is_cpu(device: torch.device | str | int) -> bool:
    return not torch.cuda.is_available() if device == "auto" else str(device).startswith("cpu")


def _check_alike(source: Checkpoint, out: Checkpoint, window: int) -> None:
    if source.dims.vocab != out.dims.vocab:
        raise UsageError(
            f"{out.source.folder} has a vocabulary of {out.dims.vocab} tokens and {source.source.folder} one of "
            f"{source.dims.vocab}, so they cannot be compared; pass the source that it was made from."
        )
    for checkpoint in (source, out):
        if window > checkpoint.dims.context:
            raise UsageError(
                f"a window of {window} tokens is longer than the {checkpoint.dims.context} that "
                f"{checkpoint.source.folder} was made for; give a smaller one."
            )


def _windows(
    source: PathLike, out: PathLike, text: str, sizes: tuple[int, int | None, int | None]
) -> Windows:
    """The windows of a text, on which the tokenizers of both folders must agree."""
    wanted, found = (cut(text, load_tokenizer(folder), *sizes) for folder in (source, out))
    if wanted.prefix != found.prefix or not torch.equal(wanted.ids, found.ids):
        raise UsageError(
            f"the tokenizers of {out} and {source} give different tokens for this text, so their models cannot be "
            "compared; pass the source that it was made from, or copy its tokenizer files again."
        )
    return wanted


def _compare(
    models: list[BlockwiseModel], states: list[list[Tensor]], windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64: negative log-likelihoods [2, windows, scored], KL divergences and equal tops [windows, scored]."""
    count, scored = len(windows.ids), windows.scored
    loss = torch.empty(2, count, scored, dtype=torch.float64)
    divergence, same = torch.empty_like(loss[0]), torch.empty_like(loss[0])
    with models[0].head() as source_head, models[1].head() as out_head, torch.no_grad():
        heads = source_head, out_head
        for window, ids in enumerate(windows.ids):
            first = len(ids) - scored
            step = max(1, _LOGITS // models[0].vocab)
            for start in range(0, scored, step):
                place = slice(start, min(scored, start + step))
                rows = slice(first - 1 + start, first - 1 + place.stop)  # each predicts the token after it
                targets = ids[first + start : first + place.stop, None].to(models[0].device)
                logits = [head(state[window][rows]) for head, state in zip(heads, states, strict=True)]
                for model, found in zip(models, logits, strict=True):
                    model.check([found], "the head", window)
                p, q = (found.float().log_softmax(-1) for found in logits)
                loss[0, window, place] = -p.gather(-1, targets)[:, 0].cpu()
                loss[1, window, place] = -q.gather(-1, targets)[:, 0].cpu()
                divergence[window, place] = (p.exp() * (p - q)).sum(-1).cpu()
                same[window, place] = (p.argmax(-1) == q.argmax(-1)).cpu()
    return loss, divergence, same


def _quantile(by_token: Tensor, which: float) -> Estimate:
    """A quantile of all tokens [windows, tokens]; its error from windows drawn again with replacement."""
    value = float(_at(by_token, which))
    count = len(by_token)
    if count == 1:
        return Estimate(value, None)
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=generator)
    return Estimate(value, float(torch.stack([_at(by_token[rows], which) for rows in drawn]).std()))


def _at(values: Tensor, which: float) -> Tensor:
    # torch.quantile takes 16 million values at most
    rank = max(1, round(which * values.numel()))
    return values.flatten().kthvalue(rank).values
