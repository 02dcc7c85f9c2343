"""The operators ``glmquant::linear_w4`` and ``glmquant::linear_w8``: ``y = x @ dequantize(weight).T + bias``.

The layout of a weight [out, in] of b bits, which is that of compressed-tensors' ``pack-quantized`` but for the zero
point:

    weight_packed      int32 [out, ceil(in*b/32)]   code + 2**(b-1), element 0 in the lowest bits
    weight_scale       half, bfloat16 or float32 [out, groups]; a group is in/groups adjacent columns
    weight_zero_point  int8 [out, groups] on the signed grid of the codes, or None

They also take the layouts of `glmquant.ops.interleaved` and `glmquant.ops.humming`, which are for GPUs. They are opaque
to torch.compile, so a compiled model calls the same kernels as an eager one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from . import reference
from .choice import Request, choose
from .interleaved import CHUNK
from .weight import Layout, height

__all__ = ["dequantize", "linear"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """``x @ W.T + bias`` with a packed weight (see the module).

    Args:
        x: [..., in], half, bfloat16 or float32.
        weight_packed: int32 [out, ceil(in*bits/32)].
        weight_scale: [out, groups].
        weight_zero_point: int8 [out, groups] or None.
        bias: [out] or None.
        bits: 4 or 8.

    Returns:
        [..., out] in the dtype of `x`. Weights are rounded to that dtype before they are multiplied, or not rounded
        at all, which depends on the implementation.

    Raises:
        UsageError: shapes or dtypes that do not go together.
    """
    op = torch.ops.glmquant.linear_w4 if bits == 4 else torch.ops.glmquant.linear_w8
    result: Tensor = op(x, weight_packed, weight_scale, weight_zero_point, bias)
    return result


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed weight as [rows, columns] of `dtype`; see `glmquant.ops.reference.dequantize`.

    Raises:
        UsageError: shapes or dtypes that do not go together.
    """
    x = torch.empty((0, columns), dtype=dtype, device=packed.device)
    _check(x, packed, scale, zero_point, None, bits)
    return reference.dequantize(packed, scale, zero_point, bits, columns, dtype)


def _define(bits: int) -> None:
    name = f"glmquant::linear_w{bits}"
    torch.library.define(
        name,
        "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(
        x: Tensor, weight_packed: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        _check(x, weight_packed, weight_scale, zero_point, bias, bits)
        request = Request.of(x, weight_scale, zero_point, bits, Layout(weight_packed.dim()))
        rows = x.reshape(-1, x.shape[-1])
        y = choose(request).run(rows, weight_packed, weight_scale, zero_point, bias, bits)
        return y.view(*x.shape[:-1], height(weight_packed))

    def fake(
        x: Tensor, weight_packed: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        _check(x, weight_packed, weight_scale, zero_point, bias, bits)
        return x.new_empty((*x.shape[:-1], height(weight_packed)))

    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)


def _check_ranks(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    """Tables, and in each something to compute with."""
    axis = 1 if packed.dim() == 2 else 0  # of the groups
    if (
        x.dim() < 1
        or not 2 <= packed.dim() <= 4
        or scale.dim() != 2
        or not x.shape[-1]
        or not scale.shape[axis]
    ):
        raise UsageError(
            f"activations {list(x.shape)}, a weight stored as {list(packed.shape)} and scales {list(scale.shape)} are "
            "no [..., in], table of codes and [out, groups]."
        )


def _check(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> None:
    """What would otherwise be a wrong result, or an access beyond the end in a kernel."""
    _check_ranks(x, packed, scale)
    columns, rows, layout = x.shape[-1], height(packed), Layout(packed.dim())
    others = [t for t in (packed, scale, zero_point, bias) if t is not None and t.device != x.device]
    if others:
        raise UsageError(f"activations on {x.device} do not go with a quantized layer on {others[0].device}.")
    if x.dtype not in _FLOATS:
        raise UsageError(f"a quantized layer takes half, bfloat16 or float32 activations, not {x.dtype}.")
    groups, scales = scale.shape
    shape: tuple[float, ...]
    zero_points: tuple[torch.dtype, tuple[int, ...]]
    if layout is Layout.FILE:
        scales, groups = groups, scales
        shape, zero_points = (rows, -(-columns * bits // 32)), (torch.int8, scale.shape)
    elif layout is Layout.INTERLEAVED:
        shape, zero_points = (rows, -(-columns // CHUNK), 2 * bits), (torch.int16, scale.shape)
    else:  # where nothing is filled up
        shape, zero_points = (columns / 16, rows // 64, 32, bits), (torch.int32, (groups, rows // 8))
    if packed.dtype != torch.int32 or packed.shape != shape:
        raise UsageError(
            f"activations of width {columns} do not fit a {bits}-bit weight stored as {packed.dtype} "
            f"{list(packed.shape)}."
        )
    if scales != rows or columns % max(1, groups) or scale.dtype not in _FLOATS:
        raise UsageError(
            f"scales {list(scale.shape)} of {scale.dtype} do not fit a weight of [{rows}, {columns}]."
        )
    if zero_point is not None and (zero_point.dtype, zero_point.shape) != zero_points:
        raise UsageError(
            f"zero points {list(zero_point.shape)} of {zero_point.dtype} do not fit scales {list(scale.shape)}."
        )
    if bias is not None and bias.shape != (rows,):
        raise UsageError(f"a bias of {list(bias.shape)} does not fit {rows} output rows.")
    if bias is not None and bias.dtype not in _FLOATS:
        raise UsageError(f"a quantized layer takes a half, bfloat16 or float32 bias, not {bias.dtype}.")


_define(4)
_define(8)
