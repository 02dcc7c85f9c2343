"""The compiled CPU kernels for packed weights (``kernels/cpu/linear.cpp``), which read them as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native
from .._cuda import packing as on_gpu
from .._floats import FLOATS

if TYPE_CHECKING:
    from .choice import Request

# With more rows, unpacking a tile once and multiplying by BLAS is faster (measured on two AVX-512 cores, where torch
# multiplies bfloat16 on AMX and half as float32).
_FEW_ROWS = {torch.float16: 64, torch.bfloat16: 8, torch.float32: 64}


def objection(request: Request) -> str | None:
    """Why `linear` is not for a request; see `glmquant.ops.choice`."""
    if request.device != "cpu":
        return f"the activations are on {request.device}"
    most = _FEW_ROWS[request.dtype]
    if request.rows > most:
        return f"there are {request.rows} rows, and above {most} unpacking once is faster"
    return _native.why_not()


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`glmquant.ops.linear` for x [rows, in]. Sums in float32, and does not round weights to the dtype of `x`."""
    library = _native.library()
    assert library is not None
    rows, columns = x.shape
    wide, packed, scale = x.float().contiguous(), packed.contiguous(), scale.contiguous()
    zeros = None if zero_point is None else zero_point.contiguous()
    y = torch.empty(rows, packed.shape[0])
    library.glmquant_linear(
        wide.data_ptr(), rows, columns, packed.data_ptr(), *packed.shape, bits,
        scale.data_ptr(), FLOATS[scale.dtype], scale.shape[1], None if zeros is None else zeros.data_ptr(),
        y.data_ptr(),
    )  # fmt: skip
    if bias is not None:
        y += bias
    return y.to(x.dtype)


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
