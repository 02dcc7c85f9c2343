"""Random matrices; needs nothing but torch."""

from __future__ import annotations

import torch
from torch import Tensor


def random_weight(kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A seeded matrix of one of the distributions that weights have, or should not have."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)) + rows + columns)
    normal = torch.randn(rows, columns, generator=generator)
    other = torch.randn(rows, columns, generator=generator)
    if kind == "laplace":
        values = normal.square().add(other.square()).sqrt() * torch.randn(rows, columns, generator=generator)
    elif kind == "heavy-tail":  # Student's t with three degrees of freedom
        chi = torch.randn(3, rows, columns, generator=generator).square().sum(0)
        values = normal / (chi / 3).sqrt()
    elif (
        kind == "outlier-columns"
    ):  # like trained weights: rows of unlike sizes, a few columns that stick out
        values = normal * torch.rand(rows, 1, generator=generator).add(0.3)
        values[:, :: max(1, columns // 4)] *= 6
    elif kind == "shifted":
        values = normal * 0.5 + 1
    else:
        assert kind == "gaussian", kind
        values = normal
    return (values * 0.02).to(dtype)


WEIGHT_KINDS = ("gaussian", "laplace", "heavy-tail", "outlier-columns", "shifted")
