"""Least squares in which every column counts as much as its input does, and those in which zero points are free.

For uncorrelated inputs the output of a layer changes by ``sum_j h_j (w_j - w'_j)^2`` with ``h_j = E[x_j^2]``. As with
`LeastSquares`, the best scale of fixed codes q (less their zero point) is ``A / B`` with ``A = sum(h*q*w)`` and
``B = sum(h*q*q)``, and the error that it leaves is smaller by ``A*A / B``. So a candidate, a clipping range with a zero
point, costs one pass and comes with its best scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..scheme import QuantizedTensor, Scheme
from .grid import absmax, asymmetric_grid, divided, divisor, group_view, round_to_codes
from .mse import LeastSquares

_WEIGHTS = 1 << 18  # that are worked on together
_STEP = 0.05  # between clipping ranges, relative to the range in which the extreme weight just gets code qmin
_RANGES = 12
_ZERO_POINTS = (-1, 1, -2, 2)  # beside the one of the whole range


@dataclass(frozen=True)
class WeightedLeastSquares:
    """See the module."""

    @torch.no_grad()
    def __call__(self, weight: Tensor, scheme: Scheme, statistics: Tensor | None = None) -> QuantizedTensor:
        """See `Quantizer`.

        Args:
            weight: see there.
            scheme: see there.
            statistics: second moments of the inputs, float32 [columns, columns], of which the diagonal is looked at, or
                that diagonal. Without it this is `LeastSquares`.
        """
        if statistics is None:
            return LeastSquares()(weight, scheme)
        importance = (statistics.diagonal() if statistics.dim() == 2 else statistics).float()
        # An input that the text never moves may move yet.
        return _searched(weight, scheme, importance + 1e-4 * importance.mean())


@dataclass(frozen=True)
class Hqq:
    """Zero points that are searched too, as HQQ has it (half-quadratic quantization, Badri and Shaji 2023).

    There, zero points are any numbers, and found in steps; here they are integers, as formats store them, and those
    around the middle are simply tried. Needs no data.
    """

    def __call__(self, weight: Tensor, scheme: Scheme, statistics: Tensor | None = None) -> QuantizedTensor:
        """See `Quantizer`."""
        if scheme.symmetric:
            return LeastSquares()(weight, scheme)  # nothing to search
        return _searched(weight, scheme, torch.ones(weight.shape[1], device=weight.device))


def _searched(weight: Tensor, scheme: Scheme, importance: Tensor) -> QuantizedTensor:
    step = max(1, _WEIGHTS // weight.shape[1])
    blocks = [_block(rows, scheme, importance) for rows in weight.split(step)]  # type: ignore[no-untyped-call]
    parts = [[block.codes, block.scale, block.zero_point] for block in blocks]
    codes, scale, zero_point = (
        None if found[0] is None else torch.cat(found) for found in zip(*parts, strict=True)
    )
    assert codes is not None
    assert scale is not None
    return QuantizedTensor(codes, scale, zero_point, scheme)


def _block(weight: Tensor, scheme: Scheme, importance: Tensor) -> QuantizedTensor:
    largest = absmax(weight, scheme)  # refuses NaN and Inf
    exact = weight.float()
    grouped = group_view(exact, scheme)
    step = _STEP if scheme.bits == 4 else _STEP / 4
    if scheme.symmetric:
        # The extreme goes to the side of qmin, which has one more code.
        sign = torch.where(grouped.amax(-1) == largest, -1.0, 1.0)
        whole = divided(largest * sign, -scheme.qmin)
        first = -scheme.qmin / scheme.qmax
        middle = torch.zeros_like(whole)
    else:
        low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
        stored, middle = asymmetric_grid(low, high, scheme)
        whole, first = stored.float(), 1.0
    search = _Search(grouped, group_view(importance[None], scheme), whole, scheme, middle)
    for number in range(_RANGES):
        search.attempt(torch.full_like(whole, first - number * step), middle)
    if not scheme.symmetric:
        for steps in _ZERO_POINTS:
            search.attempt(search.range, (middle + steps).clamp_(scheme.qmin, scheme.qmax))
    for shift in (-step / 2, step / 2):
        search.attempt(search.range + shift, search.zero_point)
    scale = scheme.store_scale(search.scale)
    zeros = None if scheme.symmetric else search.zero_point
    codes = round_to_codes(exact, scale, zeros, scheme)
    return QuantizedTensor(codes, scale, None if zeros is None else zeros.to(torch.int8), scheme)


@dataclass
class _Search:
    """The best candidate of every group so far.

    Attributes:
        grouped: weights [rows, groups, columns per group].
        importance: of the columns, [1, groups, columns per group].
        whole: the scale of the range 1, [rows, groups].
        scheme: what codes there are.
        zero_point: of the best candidate; as the other three [rows, groups].
        range: its clipping range.
        scale: its least squares.
        quality: by how much it lowers the error, compared with codes of zero.
    """

    grouped: Tensor
    importance: Tensor
    whole: Tensor
    scheme: Scheme
    zero_point: Tensor
    range: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    quality: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.range, self.scale = torch.ones_like(self.whole), torch.zeros_like(self.whole)
        self.quality = torch.full_like(self.whole, -1.0)

    def attempt(self, range_: Tensor, zero_point: Tensor) -> None:
        """Try a candidate in every group. In groups of zeros its quality is NaN, and never better."""
        codes = torch.div(self.grouped, divisor(self.whole * range_)).round_()
        lowest, highest = ((limit - zero_point)[..., None] for limit in (self.scheme.qmin, self.scheme.qmax))
        codes = torch.minimum(torch.maximum(codes, lowest, out=codes), highest, out=codes)
        squares = (self.importance * codes).mul_(codes).sum(-1)
        cross = codes.mul_(self.grouped).mul_(self.importance).sum(-1)
        scale = cross / squares
        quality = cross * scale
        better = quality > self.quality
        self.range, self.scale, self.quality, self.zero_point = (
            torch.where(better, new, old)
            for new, old in (
                (range_, self.range), (scale, self.scale), (quality, self.quality), (zero_point, self.zero_point)
            )
        )  # fmt: skip
