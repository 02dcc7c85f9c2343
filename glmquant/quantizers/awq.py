"""AWQ: channels that count are made larger before they are quantized, and smaller again in what computes them.

In a group of weights with a common step, the error of every weight is alike, and what it does to the output grows with
the input that meets it. A weight times s and its input divided by s are the same to the model; the error that counts
then shrinks by s, until the weight is the largest of its group and makes the step grow (Lin et al. 2023, arXiv
2306.00978). As there, ``s_j = a_j ** e`` for the magnitude a_j of input channel j, with one exponent e for all inputs
of a layer, that with the least error of its output. Here a_j is the root of the mean square, the error is taken from
the second moments H of the inputs, ``trace(E H E^T)``, and of evenly spaced rows of the weights; scales are rounded to
the steps of `glmquant._folding`, which moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._folding import MOST, STEPS, scales, to_channels, to_columns
from ..families import Fold
from ..scheme import QuantizedTensor, Scheme
from .base import Quantizer

_ROWS = 256  # of the weights that share an input, on which exponents are judged


@dataclass(frozen=True)
class Scaled:
    """See the module.

    Attributes:
        solver: quantizes what is scaled.
        exponents: that are tried beside 0, which changes nothing.
    """

    solver: Quantizer
    exponents: tuple[float, ...]

    def __call__(self, weight: Tensor, scheme: Scheme, statistics: Tensor | None = None) -> QuantizedTensor:
        """See `Quantizer`; of weights that have been scaled, and their inputs."""
        return self.solver(weight, scheme, statistics)

    @torch.no_grad()
    def steps(
        self, fold: Fold, weights: Sequence[Tensor], schemes: Sequence[Scheme], moments: Tensor
    ) -> Tensor:
        """The steps of the best scales, int8 [channels]; the larger, the more a channel counts.

        Args:
            fold: the channels.
            weights: of the takers, [rows, columns] each.
            schemes: of the takers.
            moments: second moments of their inputs, float32 [columns, columns].
        """
        stride = -(-sum(len(weight) for weight in weights) // _ROWS)
        sampled = [weight[::stride].float() for weight in weights]
        squares = to_channels(fold, moments.diagonal())
        logs = (squares + 1e-4 * squares.mean()).clamp_(min=torch.finfo(torch.float32).tiny).log2() / 2
        logs -= logs.mean()
        best = torch.zeros(fold.channels, dtype=torch.int8, device=moments.device)
        least = self._loss(fold, best, sampled, schemes, moments)
        for exponent in self.exponents:
            steps = (STEPS * exponent * logs).round_().clamp_(-MOST, MOST).to(torch.int8)
            loss = self._loss(fold, steps, sampled, schemes, moments)
            if loss < least:
                best, least = steps, loss
        return best

    def _loss(
        self, fold: Fold, steps: Tensor, weights: Sequence[Tensor], schemes: Sequence[Scheme], moments: Tensor
    ) -> float:
        scale = to_columns(fold, scales(steps))
        scaled = (moments / scale).div_(scale[:, None])  # 750 MiB at 14,000 columns
        total = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            error = self.solver(weight * scale, scheme, scaled).dequantize() / scale - weight
            total += float((error @ moments).mul_(error).sum(dtype=torch.float64))
        return total
