"""Scales of the channels between two layers, moved from one to the other: what ``--method awq`` does to weights.

A channel that is divided by s where it comes from (in a norm's gain, or in the rows of a weight and its bias) and
multiplied by s where it goes to (in columns of weights) leaves the model the same function, but not its quantization.
Scales are powers of 2**(1/4), so that a letter records each. A norm is stored in 16 bits: the scale that counts is what
became of its gain, ``g / stored(g / s)``, so that nothing is lost by rounding.
"""

from __future__ import annotations

from string import ascii_letters, digits

import torch
from torch import Tensor

from .families import Fold, Role

_LETTERS = ascii_letters + digits + "+"
STEPS = 4  # to the factor 2
MOST = len(_LETTERS) // 2  # steps up or down
# Of Python's floats, whose powers round alike on all machines.
_SCALES = torch.tensor([2 ** (step / STEPS) for step in range(-MOST, MOST + 1)], dtype=torch.float32)


def scales(steps: Tensor) -> Tensor:
    """2**(steps / STEPS), float32, for integers of `MOST` at most."""
    return _SCALES.to(steps.device)[steps.long() + MOST]


def to_columns(fold: Fold, values: Tensor) -> Tensor:
    """Values of channels [channels] as those of the takers' columns [channels * repeat]."""
    return values.view(-1, fold.block).repeat_interleave(fold.repeat, 0).flatten()


def to_channels(fold: Fold, values: Tensor) -> Tensor:
    """Means over the columns [channels * repeat] that share a channel, [channels]."""
    return values.view(-1, fold.repeat, fold.block).mean(1).flatten()


def effective(fold: Fold, steps: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales of channels that come of `steps`, float32 [channels].

    Args:
        fold: which channels.
        steps: integers [channels]; see `scales`.
        gain: of the norm that gives the channels, [channels]; not looked at where it is no norm.
        dtype: in which that norm is stored.
    """
    scale = scales(steps.cpu())
    if fold.giver.role is not Role.NORM:
        return scale
    stored = (gain.float() / scale).to(dtype)
    sound = stored.isfinite() & (stored.abs() >= torch.finfo(dtype).tiny) & (scale != 1)
    return torch.where(sound, gain.float() / stored.float(), 1.0)


class Folds:
    """The scales of a model, as far as they are known, applied to its tensors while they are read."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, Tensor]] = {}  # from which row on, and what divides those
        self._columns: dict[str, Tensor] = {}

    def add(self, fold: Fold, scale: Tensor) -> None:
        """Scale the channels of `fold`, as `effective` has it."""
        first = fold.giver.shape[0] - fold.channels
        for name in (fold.giver.name, fold.giver.name.removesuffix("weight") + "bias"):
            self._rows[name] = (first, scale)
        for taker in fold.takers:
            self._columns[taker.name] = to_columns(fold, scale)

    def __contains__(self, name: object) -> bool:
        """Whether `apply` changes a tensor of that name."""
        return name in self._rows or name in self._columns

    def apply(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """Rows from `start` on of the source's tensor `name` as they are to be: float32 where they change."""
        if name in self._columns:
            rows = rows.float() * self._columns[name].to(rows.device)
        if name in self._rows:
            first, scale = self._rows[name]
            divided = torch.ones(len(rows))
            low, high = max(first - start, 0), min(first + len(scale) - start, len(rows))
            if low < high:
                divided[low:high] = scale[start + low - first : start + high - first]
                rows = rows.float() / divided.view(-1, *[1] * (rows.dim() - 1)).to(rows.device)
        return rows


def to_letters(steps: Tensor) -> str:
    """Steps [channels] as a string of as many letters."""
    return "".join(_LETTERS[step + MOST] for step in steps.tolist())


def from_letters(letters: str) -> Tensor:
    """The inverse of `to_letters`; ValueError for a letter that is none."""
    return torch.tensor([_LETTERS.index(letter) for letter in letters]).sub_(MOST)
