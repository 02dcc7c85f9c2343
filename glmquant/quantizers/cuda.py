"""The quantizers' twin on a GPU (``kernels/cuda/quantize.cu``): the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _cuda
from .._cuda.packing import Layout, eights, empty
from .._floats import FLOATS
from ..scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    from .native import Method, Search


def quantize(weight: Tensor, scheme: Scheme, method: Method, search: Search) -> QuantizedTensor | None:
    """What the quantizer of this `method` gives for `weight` [rows, columns], which is on a GPU.

    None where there are no kernels, or where the torch code has an error to report.
    """
    found = quantize_packed(weight, scheme, method, search, Layout.CODES)
    return found and QuantizedTensor(*found, scheme)


def quantize_packed(
    weight: Tensor, scheme: Scheme, method: Method, search: Search, layout: Layout
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The same with codes packed in a layout: packed, scale [rows, groups], zero point int8 [rows, groups] or None."""
    rows, columns = weight.shape
    if not weight.is_contiguous() or not 0 < eights(rows, columns) <= _cuda.MOST_THREADS:
        return None
    kernels = _cuda.kernels(weight.device)
    if kernels is None:
        return None
    on = weight.device
    groups = scheme.groups(columns)
    width = columns // groups
    scale_dtype = getattr(torch, scheme.scale_dtype)
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=on)
    zero_point = None if scheme.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=on)
    status = torch.zeros(1, dtype=torch.int32, device=on)
    inverses = search.inverses.to(on)
    kernels.launch(
        "glmquant_scales", rows * groups, weight, FLOATS[weight.dtype], rows * groups, width, scheme.bits,
        scheme.symmetric, method, inverses, len(inverses), search.first, float(1 << search.value_bits), scale,
        FLOATS[scale_dtype], zero_point, status,
    )  # fmt: skip
    packed = empty(layout, rows, columns, scheme.bits, on)
    kernels.launch(
        "glmquant_encode", eights(rows, columns), weight, FLOATS[weight.dtype], rows, columns, groups, width,
        scheme.bits, method, scale, FLOATS[scale_dtype], zero_point, layout, packed,
    )  # fmt: skip
    return None if status.item() else (packed, scale, zero_point)


def squared_sums(weight: Tensor, quantized: QuantizedTensor) -> tuple[float, float] | None:
    """See `glmquant.quantizers.native.squared_sums`."""
    rows, columns = weight.shape
    kernels = _cuda.kernels(weight.device)
    if kernels is None or not weight.is_contiguous() or not 0 < eights(rows, columns) <= _cuda.MOST_THREADS:
        return None
    threads = rows * -(-columns // 128)
    sums = torch.empty(threads, 2, dtype=torch.float64, device=weight.device)
    groups = quantized.scale.shape[1]
    zero_point = quantized.zero_point
    kernels.launch(
        "glmquant_errors", threads, weight, FLOATS[weight.dtype], rows, columns, groups, columns // groups,
        quantized.codes.contiguous(), quantized.scale.contiguous(), FLOATS[quantized.scale.dtype],
        None if zero_point is None else zero_point.contiguous(), sums,
    )  # fmt: skip
    error, norm = sums.sum(0).tolist()
    return error, norm
