"""Which implementation computes a packed linear layer, decided here and nowhere else.

`IMPLEMENTATIONS` is in order of preference. Each says, for a `Request`, why it cannot or should not be used; the first
with nothing to say is chosen. The last, plain PyTorch, never declines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import humming, native, triton
from .reference import linear_tiled
from .weight import Layout, Weight, height


@dataclass(frozen=True)
class Request:
    """What is asked of an implementation.

    Attributes:
        device: ``cpu``, ``cuda``, ...
        dtype: of the activations and of the result.
        rows: of the activations, all leading dimensions together.
        columns: width of the weight.
        group_size: columns that share a scale.
        bits: 4 or 8.
        symmetric: whether there are no zero points.
        scale_dtype: of the scales.
        layout: of the weight.
    """

    device: str
    dtype: torch.dtype
    rows: int
    columns: int
    group_size: int
    bits: int
    symmetric: bool
    scale_dtype: torch.dtype
    layout: Layout = Layout.FILE

    @classmethod
    def of(
        cls, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, layout: Layout = Layout.FILE
    ) -> Request:
        """The request that the operands of `glmquant.ops.linear` make."""
        columns = x.shape[-1]
        rows = x.numel() // max(1, columns)
        group = columns // max(1, scale.shape[1 if layout is Layout.FILE else 0])
        return cls(
            x.device.type, x.dtype, rows, columns, group, bits, zero_point is None, scale.dtype, layout
        )


class Run(Protocol):
    """The computation: x [rows, in] -> [rows, out]; the rest is described in `glmquant.ops.linear`."""

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        bits: int,
    ) -> Tensor:
        """Multiply."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute it.

    Attributes:
        name: for people.
        objection: why it is not for a request, as an end of the sentence "not used, because ..."; None if it is.
        run: see `Run`.
    """

    name: str
    objection: Callable[[Request], str | None]
    run: Run


def _of_files(objection: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """For what reads the layout of files alone."""
    return lambda request: (
        objection(request) if request.layout is Layout.FILE else "the weight is arranged for a GPU"
    )


IMPLEMENTATIONS: list[Implementation] = [
    Implementation(
        "compiled CPU kernel, 8-bit activations",
        _of_files(native.short_objection),
        native.linear_short,
    ),
    Implementation("compiled CPU kernel", _of_files(native.objection), native.linear),
    Implementation("humming-kernels", humming.objection, humming.linear),
    Implementation("Triton kernel", triton.objection, triton.linear),
    Implementation("PyTorch, tile by tile", lambda request: None, linear_tiled),
]


def choose(request: Request) -> Implementation:
    """The first implementation without an objection."""
    return next(i for i in IMPLEMENTATIONS if i.objection(request) is None)


def best_layout(weight: Weight, bits: int, columns: int) -> Layout:
    """The layout in which a weight [out, columns], whichever it has, is multiplied fastest where it lies."""
    if humming.layout_objection(weight, bits, columns) is None:
        return Layout.HUMMING
    rows = height(weight.packed)
    objection = triton.layout_objection(weight.packed.device, rows, weight.groups, columns)
    return Layout.INTERLEAVED if objection is None else Layout.FILE


def explain(request: Request) -> str:
    """One line for every implementation up to the one that is used, and why the others are not."""
    lines: list[str] = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.objection(request)
        if reason is None:
            return "\n".join([*lines, f"{implementation.name}: used"])
        lines.append(f"{implementation.name}: not used, because {reason}")
    raise AssertionError("the last implementation declines nothing")
