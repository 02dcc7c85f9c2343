"""The next token of every row of a batch, each by the settings and the random numbers of its own request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Top-p sets are nearly always smaller than this, and finding the largest few is far cheaper than sorting all.
_LIKELY = 512
_GREEDY = (
    1e-6  # below this temperature float32 holds no quotients of logits, and nothing but the likeliest is left
)


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen.

    Attributes:
        temperature: what logits are divided by; 0, or next to it, takes the likeliest token.
        top_p: the smallest set of tokens with this probability is drawn from.
        seed: of the request's random numbers; None for any.
        repetition_penalty: makes ids of the prompt and of the answer so far less likely, above 1.
    """

    temperature: float
    top_p: float
    seed: int | None = None
    repetition_penalty: float = 1.0


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
        return self.sampling.temperature < _GREEDY

    def draw(self, weights: Tensor) -> int:
        """An index of `weights` [n], which need not sum to 1."""
        sums = weights.double().cumsum(0)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        # Rounding may put the point on the last sum itself, and tokens without weight have no place to be hit.
        index = int(torch.searchsorted(sums, point, right=True))
        return index if index < len(weights) else int(weights.nonzero()[-1])


def penalize(logits: Tensor, samplers: Sequence[Sampler], seen: Sequence[Sequence[int]]) -> Tensor:
    """Logits with each row's repetition penalty, as in transformers: divided where positive, multiplied elsewhere.

    Args:
        logits: [rows, vocab].
        samplers: one for each row.
        seen: for each row, the ids so far.
    """
    rows = [row for row, sampler in enumerate(samplers) if sampler.sampling.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        ids = torch.tensor(seen[row], device=logits.device)
        penalty = samplers[row].sampling.repetition_penalty
        scores = logits[row, ids]
        logits[row, ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


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
