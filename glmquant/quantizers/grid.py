"""The arithmetic that quantizers share: group views, extremes, and rounding to codes.

Written for the speed of plain torch on a CPU: everything works in place on float32 blocks of about two megabytes,
which stay in the shared cache; whole-tensor temporaries would go through main memory ten times.
"""

from __future__ import annotations

import torch

from ..errors import QuantizationError
from ..scheme import Scheme


def group_view(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[rows, columns] -> [rows, groups, columns per group], without a copy."""
    rows, columns = weight.shape
    return weight.view(rows, scheme.groups(columns), -1)


def largest_magnitude(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last dimension as float32; NaN or infinity if there is one.

    For 16-bit floats the maximum is taken over bit patterns, 25 times faster than torch's infinity norm.
    """
    if values.dtype in (torch.float16, torch.bfloat16):
        # Without their sign, the patterns are ordered as the numbers are, infinity and then NaN last.
        return (values.view(torch.int16) & 0x7FFF).amax(-1).view(values.dtype).float()
    return values.abs().amax(-1).float()  # amax propagates NaN


def absmax(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Largest magnitude of each group, float32 [rows, groups].

    Raises:
        QuantizationError: the weight holds NaN or Inf.
    """
    largest = largest_magnitude(group_view(weight, scheme))
    if not bool(torch.isfinite(largest).all()):
        found = "NaN" if bool(torch.isnan(weight).any()) else "an infinite value"
        raise QuantizationError(f"it holds {found}")
    return largest


def divided(values: torch.Tensor, by: int) -> torch.Tensor:
    """``values / by``, rounded once. On a GPU torch multiplies by the inverse of a number, which rounds twice."""
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """`scale` [rows, groups] as float32 [rows, groups, 1], fit to divide by: 0 becomes infinity, so that
    every code of such a group is 0.
    """
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide == 0, torch.inf, wide)


def round_to_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """``clamp(round_half_even(weight / scale) + zero_point)`` as int8 [rows, columns].

    The division is a float32 division by the stored scale; that pins the codes on every device.

    Args:
        weight: float32 [rows, columns]; left as it is.
        scale: [rows, groups], in its stored dtype.
        zero_point: [rows, groups] or None.
        scheme: gives groups and the range of codes.
    """
    codes = torch.div(group_view(weight, scheme), divisor(scale)).round_()
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    return codes.clamp_(scheme.qmin, scheme.qmax).to(torch.int8).view(weight.shape)


def asymmetric_grid(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (stored dtype) and zero point (float32, integral) of groups that span ``low..high``.

    Zero is always on the grid: `low` is at most 0 and `high` at least 0.
    """
    scale = scheme.store_scale(divided(high - low, scheme.qmax - scheme.qmin))
    zero_point = torch.round(scheme.qmin - low / divisor(scale).squeeze(-1))
    return scale, zero_point.clamp_(scheme.qmin, scheme.qmax)
