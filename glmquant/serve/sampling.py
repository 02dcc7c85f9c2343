"""The next token of every row of a batch, each by the settings and the random numbers of its own request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Top-p sets are nearly always smaller than this, and finding the largest few is far cheaper than sorting all.
_LIKELY = 512


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: the smallest set of tokens with this probability is drawn from.
        seed: of the request's random numbers; None for any.
    """

    temperature: float
    top_p: float
    seed: int | None = None


class Sampler:
    """`Sampling` with its random numbers, which no other request draws from."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.sampling.temperature == 0

    def draw(self, weights: Tensor) -> int:
        """An index of `weights` [n], which need not sum to 1."""
        sums = weights.double().cumsum(0)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        # Rounding may put the point on the last sum itself, and tokens without weight have no place to be hit.
        index = int(torch.searchsorted(sums, point, right=True))
        return index if index < len(weights) else int(weights.nonzero()[-1])


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id for each row.

    Temperature first, then top-p, as in transformers. A row's token depends on that row alone.

    Args:
        logits: [rows, vocab], finite.
        samplers: one for each row.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if not drawn:
        return chosen
    settings = [samplers[row].sampling for row in drawn]
    temperatures = torch.tensor([s.temperature for s in settings], device=logits.device)
    # Shifted first, so that dividing by a tiny temperature cannot overflow.
    rows = logits[drawn].float()
    probabilities = ((rows - rows.amax(-1, keepdim=True)) / temperatures[:, None]).softmax(-1)
    best, ids = probabilities.topk(min(_LIKELY, probabilities.shape[-1]))
    best, ids = best.cpu(), ids.cpu()
    for n, (row, setting) in enumerate(zip(drawn, settings, strict=True)):
        weights, tokens = best[n], ids[n]
        if setting.top_p >= 1:
            weights, tokens = probabilities[n].cpu(), torch.arange(probabilities.shape[-1])
        elif weights.sum() < setting.top_p:
            weights, tokens = (t.cpu() for t in probabilities[n].sort(descending=True))
        if setting.top_p < 1:
            before = weights.cumsum(0) - weights
            inside = before < setting.top_p
            inside[0] = True
            weights = weights[inside]
        chosen[row] = int(tokens[samplers[row].draw(weights)])
    return chosen
