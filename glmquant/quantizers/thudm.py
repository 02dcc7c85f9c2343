"""THUDM's own quantization of ChatGLM, bit for bit: per row, symmetric, in half arithmetic.

``scale = half(float(max|row|) / (2**(bits-1) - 1))``, ``code = round_half_even(half(float(w) / float(scale)))``.
Dividing in float32 instead changes about 1 % of the INT8 codes by one, so published checkpoints can only be
reproduced this way. Two deliberate deviations, where the original divides by zero or wraps around: rows with
scale 0 get codes 0, and codes are clamped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import QuantizationError
from ..scheme import QuantizedTensor, Scheme
from . import native
from .grid import absmax, divided, divisor, group_view


@dataclass(frozen=True)
class Thudm:
    """See the module."""

    def __call__(
        self, weight: torch.Tensor, scheme: Scheme, statistics: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """See `Quantizer`. Weights that are not half are rounded to half first."""
        if weight.dtype == torch.float16 and scheme.symmetric:
            found = native.quantize(weight, scheme, native.Method.THUDM)
            if found is not None:
                return found
        return self._with_torch(weight, scheme)

    def _with_torch(self, weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
        half = weight.to(torch.float16)
        if weight.dtype != torch.float16:
            absmax(weight, scheme)  # a NaN of the weight's own comes first
            largest = half.abs().amax().item()
            if largest == float("inf"):
                raise QuantizationError("it holds values beyond the range of half precision")
        scale = scheme.store_scale(divided(absmax(half, scheme), scheme.qmax))
        codes = torch.div(group_view(half.float(), scheme), divisor(scale)).to(torch.float16)
        codes = codes.float().round_().clamp_(scheme.qmin, scheme.qmax)
        return QuantizedTensor(codes.to(torch.int8).view(weight.shape), scale, None, scheme)
