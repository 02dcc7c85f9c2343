"""Groups with a scale and a float minimum, ``w = d*q + m`` with q = 0..2**bits - 1, as in GGUF's Q4_1.

For fixed codes the best d and m are those of a linear regression of the weights on the codes. Sums are float64: what
the order of summation changes is far below what rounding d and m to half keeps.
"""

from __future__ import annotations

import torch

from ..scheme import QuantizedTensor, Scheme
from .grid import divided, divisor, group_view


def whole_range(exact: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """The grid from the smallest to the largest weight of each group of `exact` (float32 [rows, columns])."""
    grouped = group_view(exact, scheme)
    low, high = grouped.amin(-1), grouped.amax(-1)
    return _tensor(exact, *_stored(divided(high - low, _top(scheme)), low, scheme), scheme)


def least_squares(exact: torch.Tensor, scheme: Scheme, ranges: torch.Tensor) -> QuantizedTensor:
    """The grid with the least squared error among the regressions that begin at these parts of the whole range.

    Args:
        exact: float32 [rows, columns].
        scheme: with `Scheme.minimum`.
        ranges: parts of the whole range, each shrunk towards its middle.
    """
    grouped = group_view(exact, scheme)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, minimum = _stored(divided(high - low, _top(scheme)), low, scheme)
    least = _error(grouped, scale, minimum, scheme)
    for part in ranges.tolist():
        spare = (high - low) * ((1 - part) / 2)
        first = _stored(divided(high - low - 2 * spare, _top(scheme)), low + spare, scheme)
        for _ in range(2):  # the second time with the codes of the first regression
            first = _stored(*_regression(grouped, _codes(grouped, *first, scheme)), scheme)
            error = _error(grouped, *first, scheme)
            better = error < least
            least = torch.where(better, error, least)
            scale, minimum = torch.where(better, first[0], scale), torch.where(better, first[1], minimum)
    return _tensor(exact, scale, minimum, scheme)


def _top(scheme: Scheme) -> int:
    return scheme.qmax - scheme.qmin


def _stored(scale: torch.Tensor, minimum: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    return scheme.store_scale(scale), scheme.store_scale(minimum)


def _codes(grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes 0..top as float32; 0 in groups without a scale."""
    codes = (grouped - minimum.float().unsqueeze(-1)).div_(divisor(scale))
    return codes.round_().clamp_(0, _top(scheme))


def _error(grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Squared error of each group, float64 [rows, groups]."""
    codes = _codes(grouped, scale, minimum, scheme)
    found = codes.mul_(scale.float().unsqueeze(-1)).add_(minimum.float().unsqueeze(-1))
    return found.sub_(grouped).double().square_().sum(-1)


def _regression(grouped: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, float32 [rows, groups], with which `codes` come nearest to the weights."""
    weights, codes = grouped.double(), codes.double()
    mean, middle = weights.mean(-1), codes.mean(-1)
    spread = codes - middle.unsqueeze(-1)
    square = (spread * spread).sum(-1)
    scale = (spread * weights).sum(-1) / square.where(square > 0, torch.inf)
    return scale.float(), (mean - scale * middle).float()


def _tensor(
    exact: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, scheme: Scheme
) -> QuantizedTensor:
    codes = _codes(group_view(exact, scheme), scale, minimum, scheme).add_(scheme.qmin)
    return QuantizedTensor(codes.to(torch.int8).view(exact.shape), scale, None, scheme, minimum)
