"""Packed weights in plain PyTorch: unpack a tile of rows, multiply by it, drop it.

It runs on every device and is what kernels are tested against (compiled kernels unpack tiles on CPUs and GPUs, to the
same bits). The whole weight is never unpacked at once, so a model needs no more memory than its packed weights and one
tile. Codes that stand for other numbers than themselves, or count from a minimum, have no kernels: `dequantize_levels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..packing import unpack_int32
from . import native, triton
from .layouts import arranged
from .weight import Layout, Weight

# Weights in a tile. On a CPU a tile and its temporaries stay in the caches; a GPU wants few, large launches.
_TILE = {"cpu": 1 << 20}
_LARGE_TILE = 1 << 24


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed weight as [rows, columns] of `dtype`.

    Equals ``QuantizedTensor.dequantize().to(dtype)`` bit for bit: the product of a code and a scale is rounded once.

    Args:
        packed: int32 [rows, ceil(columns*bits/32)]; or in another layout, and so are the next two.
        scale: [rows, groups].
        zero_point: int8 [rows, groups] or None.
        bits: 4 or 8.
        columns: width of the weight.
        dtype: of the result.
    """
    weight = Weight(packed, scale, zero_point)
    if weight.layout is Layout.INTERLEAVED and triton.why_not(packed.device) is None:
        return triton.dequantize(packed, scale, zero_point, bits, columns, dtype)
    weight = arranged(weight, Layout.FILE, bits, columns)
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
    weight = Weight(packed, scale, zero_point)
    if weight.layout is Layout.HUMMING:  # whose rows do not lie together
        weight = arranged(weight, Layout.FILE, bits, x.shape[1])

    def tile(start: int, stop: int) -> Tensor:
        part = weight.rows(start, stop)
        return dequantize(part.packed, part.scale, part.zero_point, bits, x.shape[1], x.dtype)

    return by_tiles(x, weight.packed.shape[0], tile, bias)


def dequantize_levels(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    levels: tuple[float, ...],
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a weight whose codes stand for `levels`, as [rows, columns] of `dtype`: ``level * scale + minimum``.

    Equals ``QuantizedTensor.dequantize().to(dtype)`` bit for bit: computed in float32, rounded once at the end.

    Args:
        packed: int32 [rows, ceil(columns*bits/32)], not interleaved.
        scale: [rows, groups].
        minimum: [rows, groups] or None.
        levels: ``2**bits`` numbers, that of the smallest code first.
        columns: width of the weight.
        dtype: of the result.
    """
    rows, groups = scale.shape
    # All codes of a byte at once: one row of a table that stays in the cache.
    table = _by_byte(levels, packed.device)
    weight = torch.nn.functional.embedding(packed.view(torch.uint8).int(), table).view(rows, -1)[:, :columns]
    weight = weight.reshape(rows, groups, -1).mul_(scale.unsqueeze(-1).float())
    if minimum is not None:
        weight += minimum.unsqueeze(-1).float()
    return weight.view(rows, columns).to(dtype)


@cache  # a CUDA graph can be recorded only where nothing is copied to the device
def _by_byte(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [256, codes in a byte], the lowest bits first."""
    bits = len(levels).bit_length() - 1
    codes = [[byte >> place & len(levels) - 1 for place in range(0, 8, bits)] for byte in range(256)]
    with torch.inference_mode(False):
        return torch.tensor([[levels[code] for code in each] for each in codes], device=device)


def by_tiles(x: Tensor, height: int, tile: Callable[[int, int], Tensor], bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for x [rows, in], W being unpacked a tile at a time.

    Args:
        x: [rows, in].
        height: rows of W.
        tile: gives rows from one to another, in the dtype of `x`.
        bias: [height] or None.
    """
    step = max(1, _TILE.get(x.device.type, _LARGE_TILE) // max(1, x.shape[1]))
    y = x.new_empty(x.shape[0], height)
    # A CPU multiplies half matrices ten times more slowly than float32 ones, except for a single row.
    widen = x.dtype == torch.float16 and x.device.type == "cpu" and x.shape[0] > 1
    left = x.float() if widen else x
    for start in range(0, height, step):
        weight = tile(start, min(height, start + step))
        if x.is_cuda and not left.requires_grad:
            torch.mm(left, weight.t(), out=y[:, start : start + step])  # where it belongs, without a copy
        else:
            y[:, start : start + step] = left @ weight.to(left.dtype).t()
    return y if bias is None else y.add_(bias)
