"""The interface that every quantizer has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from ..scheme import QuantizedTensor, Scheme


class Quantizer(Protocol):
    """Chooses scales and codes for rows of a weight.

    Quantizers without `statistics` treat every row by itself, so a matrix may be given in any number of row
    blocks and split matrices get the codes of the fused one.
    """

    def __call__(
        self, weight: torch.Tensor, scheme: Scheme, statistics: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """Quantize `weight` [rows, columns] (half, bfloat16 or float32) to `scheme`.

        Raises:
            QuantizationError: the weight holds NaN or Inf, or a scale does not fit in its dtype.
        """
