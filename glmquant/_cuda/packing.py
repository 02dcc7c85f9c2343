"""Packing and unpacking on a GPU; the layouts are drawn in ``kernels/cuda/common.cuh``."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .. import _cuda
from .._floats import FLOATS


class Layout(IntEnum):
    """As the kernels number them.

    CODES: int8 [rows, columns]; `cpm`'s 8 bits. NIBBLES: int8 [rows, columns / 2], columns even; `cpm`'s 4 bits.
    WORDS: int32 [rows, ceil(columns * bits / 32)] of compressed-tensors.
    """

    CODES = 0
    NIBBLES = 1
    WORDS = 2


def empty(layout: Layout, rows: int, columns: int, bits: int, device: torch.device) -> Tensor:
    """Room for packed codes [rows, columns]."""
    if layout is Layout.WORDS:
        return torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32, device=device)
    width = columns // 2 if layout is Layout.NIBBLES else columns
    return torch.empty(rows, width, dtype=torch.int8, device=device)


def eights(rows: int, columns: int) -> int:
    """How many threads it takes, each with eight columns of a row."""
    return rows * -(-columns // 8)


def pack(codes: Tensor, bits: int, layout: Layout) -> Tensor | None:
    """int8 codes [rows, columns] in a layout; None where there are no kernels."""
    rows, columns = codes.shape
    found = _kernels_for(codes, rows, columns)
    if found is None:
        return None
    packed = empty(layout, rows, columns, bits, codes.device)
    found.launch(
        "glmquant_pack", eights(rows, columns), codes.contiguous(), rows, columns, bits, layout, packed
    )
    return packed


def unpack(packed: Tensor, columns: int, bits: int, layout: Layout) -> Tensor | None:
    """The inverse of `pack`."""
    rows = packed.shape[0]
    found = _kernels_for(packed, rows, columns)
    if found is None:
        return None
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    found.launch(
        "glmquant_unpack", eights(rows, columns), packed.contiguous(), rows, columns, bits, layout, codes
    )
    return codes


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    layout: Layout = Layout.WORDS,
) -> Tensor | None:
    """``(code - zero point) * scale`` as [rows, columns] of `dtype`, rounded once; None where there are no kernels.

    Args:
        packed: codes in `layout`.
        scale: [rows, groups], of one of `FLOATS`; a group is ``columns / groups`` adjacent columns.
        zero_point: int8 [rows, groups] or None.
        bits: 4 or 8.
        columns: width of the weight.
        dtype: one of `FLOATS`.
        layout: of `packed`.
    """
    rows, groups = scale.shape
    found = _kernels_for(packed, rows, columns)
    if found is None or scale.device != packed.device:
        return None
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    found.launch(
        "glmquant_dequantize", eights(rows, columns), packed.contiguous(), rows, columns, groups, columns // groups,
        bits, layout, scale.contiguous(), FLOATS[scale.dtype],
        None if zero_point is None else zero_point.contiguous(), out, FLOATS[dtype],
    )  # fmt: skip
    return out


def _kernels_for(tensor: Tensor, rows: int, columns: int) -> _cuda.Kernels | None:
    if not 0 < eights(rows, columns) <= _cuda.MOST_THREADS:
        return None
    return _cuda.kernels(tensor.device)
