"""Which token is chosen."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from glmquant.serve.sampling import Sampler, Sampling, choose


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.1, 0.9), (0.8, 0.8), (1.0, 0.999), (1.5, 1.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("scale", [0.05, 3.0], ids=["flat", "peaked"])
def test_tokens_are_drawn_as_transformers_would(temperature: float, top_p: float, scale: float) -> None:
    """Never a token outside of the set, and the frequencies of the likeliest are right."""
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(0)) * scale
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    truth = scores.softmax(-1)[0].double()
    sampler, draws = Sampler(Sampling(temperature, top_p, 0)), 3000
    counts = torch.bincount(torch.tensor([choose(logits, [sampler])[0] for _ in range(draws)]), minlength=700)
    assert counts[truth == 0].sum() == 0
    deviation = (truth * (1 - truth) / draws).sqrt()
    assert ((counts / draws - truth).abs() <= 5 * deviation + 4 / draws).all()


def test_greedy_and_drawn_rows_in_one_batch() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 1.0, 3.0]])
    samplers = [Sampler(Sampling(0, 1)), Sampler(Sampling(1e-6, 1, 3))]
    assert choose(logits, samplers) == [1, 2]


def test_next_to_no_temperature_is_none() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0 + 1e-6, 0.0]])
    for temperature in (0.0, 1e-50, 1e-38, 1e-7):
        samplers = [Sampler(Sampling(temperature, 1.0, seed)) for seed in range(20)]
        assert choose(logits.repeat(20, 1), samplers) == [2] * 20
