"""The operators ``glmquant::linear_w4`` and ``glmquant::linear_w8``: ``y = x @ dequantize(weight).T + bias``.

The layout of a weight [out, in] of b bits, which is that of compressed-tensors' ``pack-quantized`` but for the zero
point:

    weight_packed      int32 [out, ceil(in*b/32)]   code + 2**(b-1), element 0 in the lowest bits
    weight_scale       half, bfloat16 or float32 [out, groups]; a group is in/groups adjacent columns
    weight_zero_point  int8 [out, groups] on the signed grid of the codes, or None

They also take the layout of `glmquant.ops.interleaved`, which is for GPUs. They are opaque to torch.compile, so a
compiled model calls the same kernels as an eager one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .choice import Request, choose
from .interleaved import CHUNK
from .reference import dequantize

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
        request = Request.of(x, weight_scale, zero_point, bits, interleaved=weight_packed.dim() == 3)
        rows = x.reshape(-1, x.shape[-1])
        y = choose(request).run(rows, weight_packed, weight_scale, zero_point, bias, bits)
        return y.view(*x.shape[:-1], weight_packed.shape[0])

    def fake(
        x: Tensor, weight_packed: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        _check(x, weight_packed, weight_scale, zero_point, bias, bits)
        return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))

    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)


def _check(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> None:
    """What would otherwise be a wrong result, or an access beyond the end in a kernel."""
    columns, rows = x.shape[-1], packed.shape[0]
    others = [t for t in (packed, scale, zero_point, bias) if t is not None and t.device != x.device]
    if others:
        raise UsageError(f"activations on {x.device} do not go with a quantized layer on {others[0].device}.")
    if x.dtype not in _FLOATS:
        raise UsageError(f"a quantized layer takes half, bfloat16 or float32 activations, not {x.dtype}.")
    interleaved = packed.dim() == 3
    words = (-(-columns // CHUNK), 2 * bits) if interleaved else (-(-columns * bits // 32),)
    if packed.dtype != torch.int32 or packed.shape[1:] != words:
        raise UsageError(
            f"activations of width {columns} do not fit a {bits}-bit weight stored as {packed.dtype} "
            f"{list(packed.shape)}."
        )
    height, groups = reversed(scale.shape) if interleaved else scale.shape
    if height != rows or columns % max(1, groups) or scale.dtype not in _FLOATS:
        raise UsageError(
            f"scales {list(scale.shape)} of {scale.dtype} do not fit a weight of [{rows}, {columns}]."
        )
    whole = torch.int16 if interleaved else torch.int8
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != whole):
        raise UsageError(
            f"zero points {list(zero_point.shape)} of {zero_point.dtype} do not fit scales {list(scale.shape)}."
        )
    if bias is not None and bias.shape != (rows,):
        raise UsageError(f"a bias of {list(bias.shape)} does not fit {rows} output rows.")


_define(4)
_define(8)
