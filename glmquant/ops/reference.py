"""Packed weights in plain PyTorch: unpack a tile of rows, multiply by it, drop it.

It runs on every device and is what kernels are tested against (compiled kernels unpack tiles on CPUs and GPUs, to the
same bits). The whole weight is never unpacked at once, so a
model needs no more memory than its packed weights and one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import unpack_int32
from . import native, triton
from .interleaved import Weight, restore

# Weights in a tile. On a CPU a tile and its temporaries stay in the caches; a GPU wants few, large launches.
_TILE = {"cpu": 1 << 20}
_LARGE_TILE = 1 << 24


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed weight as [rows, columns] of `dtype`.

    Equals ``QuantizedTensor.dequantize().to(dtype)`` bit for bit: the product of a code and a scale is rounded once.

    Args:
        packed: int32 [rows, ceil(columns*bits/32)]; or interleaved, and so are the next two.
        scale: [rows, groups].
        zero_point: int8 [rows, groups] or None.
        bits: 4 or 8.
        columns: width of the weight.
        dtype: of the result.
    """
    if packed.dim() == 3:
        if triton.why_not(packed.device) is None:
            return triton.dequantize(packed, scale, zero_point, bits, columns, dtype)
        weight = restore(Weight(packed, scale, zero_point), bits, columns)
        packed, scale, zero_point = weight.packed, weight.scale, weight.zero_point
    compiled = native.dequantize(packed, scale, zero_point, bits, columns, dtype)
    return _dequantize(packed, scale, zero_point, bits, columns, dtype) if compiled is None else compiled


def _dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    # Code minus zero point is an integer of at most 9 bits, exact in bfloat16 too; so where the scale has the
    # result's dtype, the one rounding is that of the product. Otherwise the product is exact in float32.
    wide = dtype if scale.dtype == dtype else torch.float32
    rows, groups = scale.shape
    weight = unpack_int32(packed, bits, columns).reshape(rows, groups, -1).to(wide)
    if zero_point is not None:
        weight -= zero_point.unsqueeze(-1).to(wide)
    weight *= scale.unsqueeze(-1).to(wide)
    return weight.view(rows, columns).to(dtype)


def linear_tiled(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`glmquant.ops.linear` for x [rows, in]."""
    columns, height = x.shape[1], packed.shape[0]
    step = max(1, _TILE.get(x.device.type, _LARGE_TILE) // columns)
    y = x.new_empty(x.shape[0], height)
    # A CPU multiplies half matrices ten times more slowly than float32 ones, except for a single row.
    widen = x.dtype == torch.float16 and x.device.type == "cpu" and x.shape[0] > 1
    left = x.float() if widen else x
    weight = Weight(packed, scale, zero_point)
    for start in range(0, height, step):
        rows = weight.rows(start, min(height, start + step))
        tile = dequantize(rows.packed, rows.scale, rows.zero_point, bits, columns, x.dtype)
        if x.is_cuda:
            torch.mm(left, tile.t(), out=y[:, start : start + step])  # where it belongs, without a copy
        else:
            y[:, start : start + step] = left @ tile.to(left.dtype).t()
    return y if bias is None else y.add_(bias)
