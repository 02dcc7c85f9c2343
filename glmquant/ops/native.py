"""The compiled CPU kernels for packed weights (``kernels/cpu/linear.cpp``), which read them as they lie in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native
from .._cuda import packing as on_gpu
from .._floats import FLOATS

if TYPE_CHECKING:
    from .choice import Request

# Up to here a weight is read once for every four rows of activations; above, it is unpacked once for all.
_FEW_ROWS = 8
# How many signed bytes stand for an activation, see kernels/cpu/fixed.h: as exact as the dtype itself.
_PLANES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}


# Up to here rows that are tokens of different sequences are computed to the bits that each would give alone, which
# takes up to a third longer than the fastest way.
_SEQUENCES = 16
_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextmanager
def rows_alone() -> Iterator[None]:
    """In this thread a row is one sequence's, whose tokens are not to depend on how many there are.

    Products of up to 16 rows give the bits that each row gives alone, those of more rows round activations as finely.
    """
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def few(rows: int) -> bool:
    """Whether rows are multiplied by the kernel that is made for one."""
    return rows <= (_SEQUENCES if _alone.get() else _FEW_ROWS)


def objection(request: Request) -> str | None:
    """Why `linear` is not for a request; see `glmquant.ops.choice`."""
    if request.device != "cpu":
        return f"the activations are on {request.device}"
    if request.group_size != request.columns and request.group_size % 32:
        return f"groups of {request.group_size} columns do not consist of blocks of 32"
    if request.rows > _native.AMX_ROWS and request.dtype == torch.bfloat16 and _native.has_amx():
        return f"there are {request.rows} rows, and from {_native.AMX_ROWS + 1} on AMX is faster"
    return _native.why_not()


def short_objection(request: Request) -> str | None:
    """Why `linear_short` is not for a request."""
    if request.rows <= _FEW_ROWS:
        return f"{request.rows} rows wait for the weight to be read, and not for arithmetic"
    if request.dtype == torch.float32:
        return "float32 activations are to be computed exactly"
    if _alone.get():
        return "every row is to be computed as if it were alone"
    if os.environ.get("GLMQUANT_EXACT") == "1":
        return "GLMQUANT_EXACT=1 asks for exact activations"
    return objection(request)


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`glmquant.ops.linear` for x [rows, in]. Activations are rounded to 2^-15 (float32: 2^-23) of the largest of 32
    neighbours; weights are not rounded to the dtype of `x`, and sums are of integers and float32.
    """
    return _linear(x, packed, scale, zero_point, bias, bits, _PLANES[x.dtype])


def linear_short(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`linear` with activations rounded to 1/254 of the largest of 32 neighbours, which halves the arithmetic."""
    return _linear(x, packed, scale, zero_point, bias, bits, 1)


def planes(run: object, dtype: torch.dtype) -> int | None:
    """How many signed bytes stand for an activation in `linear` or `linear_short`; None for anything else."""
    return 1 if run is linear_short else _PLANES[dtype] if run is linear else None


def _linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    planes: int,
) -> Tensor:
    library = _native.library()
    assert library is not None
    rows, columns = x.shape
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    zeros = None if zero_point is None else zero_point.contiguous()
    added = None if bias is None else bias.contiguous()
    y = x.new_empty(rows, packed.shape[0])
    kernel = library.glmquant_linear if few(rows) else library.glmquant_matmul
    kernel(
        x.data_ptr(), FLOATS[x.dtype], rows, columns, packed.data_ptr(), *packed.shape, bits,
        scale.data_ptr(), FLOATS[scale.dtype], scale.shape[1], None if zeros is None else zeros.data_ptr(),
        None if added is None else added.data_ptr(), 0 if added is None else FLOATS[added.dtype], planes,
        y.data_ptr(),
    )  # fmt: skip
    return y


def linear_16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x @ weight.T + bias`` for a few rows x [..., in] of half or bfloat16 on a CPU; None where torch is to do it."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or x.dtype not in (torch.float16, torch.bfloat16)
    ):
        return None
    rows = x.numel() // max(1, x.shape[-1])
    if not (rows > 0 and few(rows)) or weight.shape[0] < 4 or not weight.is_contiguous():
        return None
    if weight.dtype != x.dtype or weight.device.type != "cpu" or (bias is not None and bias.dtype != x.dtype):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    library = _native.library()
    if library is None:
        return None
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    library.glmquant_linear_16(
        x.data_ptr(), FLOATS[x.dtype], rows, x.shape[-1], weight.data_ptr(), weight.shape[0],
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor | None:
    """What `glmquant.ops.dequantize` computes, or None where there is no kernel for it."""
    if packed.is_cuda:
        return on_gpu.dequantize(packed, scale, zero_point, bits, columns, dtype)
    library = _native.library() if packed.device.type == "cpu" else None
    if library is None:
        return None
    packed, scale = packed.contiguous(), scale.contiguous()
    zeros = None if zero_point is None else zero_point.contiguous()
    rows, words = packed.shape
    out = torch.empty(rows, columns, dtype=dtype)
    library.glmquant_dequantize(
        packed.data_ptr(), rows, 4 * words, bits, columns,
        scale.data_ptr(), FLOATS[scale.dtype], scale.shape[1], None if zeros is None else zeros.data_ptr(),
        out.data_ptr(), FLOATS[dtype],
    )  # fmt: skip
    return out
