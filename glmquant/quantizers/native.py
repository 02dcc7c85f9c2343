"""The quantizers' compiled twins: the same bytes in one pass (``kernels/cpu/quantize.cpp``), or on a GPU (`cuda`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from .. import _native
from .._floats import FLOATS
from ..scheme import QuantizedTensor, Scheme
from . import cuda


class Method(IntEnum):
    """As the kernel numbers them."""

    NEAREST = 0
    LEAST_SQUARES = 1
    THUDM = 2


@dataclass(frozen=True)
class Search:
    """What `LeastSquares` searches.

    Attributes:
        inverses: float32, what the integer values are multiplied with to give codes, best first.
        first: so many are tried for every group.
        terms: how many products of a code and a value float32 adds exactly.
        value_bits: the extreme of a group is ``2**value_bits`` as an integer value.
    """

    inverses: torch.Tensor
    first: int
    terms: int
    value_bits: int


_NO_SEARCH = Search(torch.empty(0), 0, 1, 0)


def quantize(
    weight: torch.Tensor, scheme: Scheme, method: Method, search: Search = _NO_SEARCH
) -> QuantizedTensor | None:
    """What the quantizer of this `method` gives for `weight` [rows, columns].

    None where there is no kernel, or where the torch code has an error to report.
    """
    if scheme.minimum:
        return None
    if weight.device.type == "cuda":
        return cuda.quantize(weight, scheme, method, search)
    library = _native.library()
    if library is None or weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
        return None
    rows, columns = weight.shape
    width = scheme.group_size or columns
    scale_dtype = getattr(torch, scheme.scale_dtype)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, columns // width, dtype=scale_dtype)
    zero_point = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.int8)
    status = library.glmquant_quantize(
        weight.data_ptr(), FLOATS[weight.dtype], rows, columns, width, scheme.bits, scheme.symmetric, method,
        search.inverses.data_ptr(), len(search.inverses), search.first, search.terms,
        float(1 << search.value_bits), FLOATS[scale_dtype], codes.data_ptr(), scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
    )  # fmt: skip
    return None if status else QuantizedTensor(codes, scale, zero_point, scheme)


def squared_sums(weight: torch.Tensor, quantized: QuantizedTensor) -> tuple[float, float] | None:
    """``||w - w'||**2`` and ``||w||**2`` of `weight` [rows, columns]; None where there is no kernel."""
    if quantized.minimum is not None or quantized.scheme.book == "nf4":
        return None
    if weight.device.type == "cuda":
        return cuda.squared_sums(weight, quantized)
    library = _native.library()
    if library is None or not weight.is_contiguous() or not weight.numel():
        return None
    rows, columns = weight.shape
    sums = torch.zeros(2, dtype=torch.float64)
    zero_point = quantized.zero_point
    library.glmquant_errors(
        weight.data_ptr(), FLOATS[weight.dtype], rows, columns, columns // quantized.scale.shape[1],
        quantized.codes.data_ptr(), quantized.scale.data_ptr(), FLOATS[quantized.scale.dtype],
        None if zero_point is None else zero_point.contiguous().data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return sums[0].item(), sums[1].item()


def rounded_in_turn(
    base: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor,
    gains: torch.Tensor,
    grids: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scheme: Scheme,
) -> tuple[torch.Tensor, ...] | None:
    """`glmquant.quantizers.gptq`'s inner loop (``kernels/cpu/gptq.cpp``): the best candidate of every row.

    Args:
        base: weights, float32 [columns, rows], contiguous as all the others.
        target: what is wanted of them, alike.
        factor: [columns, columns]; what the error of column i adds to what is wanted of column j is at [i, j].
        gains: what a squared error counts, [columns].
        grids: scales, their inverses and zero points, float32 [candidates, rows].
        scheme: what codes there are.

    Returns:
        Which it is, int64 [1, rows]; codes and errors [columns, 1, rows]; loss [1, rows]. None where there is no
        kernel.
    """
    library = _native.library()
    if library is None or base.device.type != "cpu":
        return None
    columns, rows = base.shape
    scale, inverse, zero_point = grids
    codes, errors = base.new_empty(columns, 1, rows), base.new_empty(columns, 1, rows)
    loss, chosen = base.new_empty(1, rows), torch.zeros(1, rows, dtype=torch.int64)
    library.glmquant_gptq(
        base.data_ptr(), target.data_ptr(), factor.data_ptr(), gains.data_ptr(), columns, rows, scale.data_ptr(),
        inverse.data_ptr(), zero_point.data_ptr(), len(scale), scheme.qmin, scheme.qmax, codes.data_ptr(),
        errors.data_ptr(), loss.data_ptr(), chosen.data_ptr(),
    )  # fmt: skip
    return chosen, codes, errors, loss
