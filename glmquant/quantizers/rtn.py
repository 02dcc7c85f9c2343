"""Round to nearest: the yardstick that every other method is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..scheme import QuantizedTensor, Scheme
from . import minimum, native
from .grid import absmax, asymmetric_grid, divided, group_view, round_to_codes


@dataclass(frozen=True)
class RoundToNearest:
    """The largest weight of a group sets its scale.

    Symmetric: ``scale = absmax / qmax`` (7 or 127). Asymmetric: ``(max - min) / 15`` with an integer zero point, or
    with the minimum as it is.
    """

    def __call__(
        self, weight: torch.Tensor, scheme: Scheme, statistics: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """See `Quantizer`."""
        found = native.quantize(weight, scheme, native.Method.NEAREST)
        return found or self._with_torch(weight, scheme)

    def _with_torch(self, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
        largest = absmax(weight, scheme)  # refuses NaN and Inf in both cases
        exact = weight.float()
        if scheme.minimum:
            return minimum.whole_range(exact, scheme)
        if scheme.symmetric:
            scale = scheme.store_scale(divided(largest, scheme.qmax))
            return QuantizedTensor(round_to_codes(exact, scale, None, scheme), scale, None, scheme)
        grouped = group_view(exact, scheme)
        low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
        scale, zero_point = asymmetric_grid(low, high, scheme)
        codes = round_to_codes(exact, scale, zero_point, scheme)
        return QuantizedTensor(codes, scale, zero_point.to(torch.int8), scheme)
