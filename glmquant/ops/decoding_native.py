"""The functions of `glmquant.ops.decoding` by the compiled CPU kernels (``kernels/cpu/decode.cpp``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _native
from .._floats import FLOATS

if TYPE_CHECKING:
    from .decoding import Cache


def why_not() -> str | None:
    """Why they cannot be used, as a sentence without its full stop; None where they can."""
    return _native.why_not()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None) -> Tensor:
    """See `glmquant.ops.decoding.rms_norm`; x is contiguous."""
    out = torch.empty_like(x)
    _library().glmquant_rms_norm(
        x.data_ptr(), None if delta is None else delta.contiguous().data_ptr(), weight.data_ptr(), FLOATS[x.dtype],
        *x.shape, epsilon, out.data_ptr(),
    )  # fmt: skip
    return out


def silu_product(both: Tensor) -> Tensor:
    """See `glmquant.ops.decoding.silu_product`."""
    rows, columns = both.shape
    both, out = both.contiguous(), both.new_empty(rows, columns // 2)
    _library().glmquant_silu_product(both.data_ptr(), FLOATS[both.dtype], rows, columns // 2, out.data_ptr())
    return out


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, cache: Cache, column: int) -> Tensor:
    """See `glmquant.ops.decoding.rotate_and_store`; `column` is that of the cache."""
    rows, (_, groups, capacity, width) = qkv.shape[0], cache.keys.shape
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    query = qkv.new_empty(rows, heads, width)
    _library().glmquant_rotate(
        qkv.data_ptr(), FLOATS[qkv.dtype], rows, heads, groups, width, cos.data_ptr(), sin.data_ptr(),
        cos.shape[1], cos.shape[1] // 2, query.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(),
        capacity, column,
    )  # fmt: skip
    return query


def attend(query: Tensor, cache: Cache, scale: float, column: int) -> Tensor:
    """See `glmquant.ops.decoding.attend`; `column` is that of the cache."""
    rows, heads, width = query.shape
    _, groups, capacity, _ = cache.keys.shape
    query, out = query.contiguous(), query.new_empty(rows, heads * width)
    _library().glmquant_attend(
        query.data_ptr(), FLOATS[query.dtype], rows, heads, groups, width, cache.keys.data_ptr(),
        cache.values.data_ptr(), capacity, cache.first.data_ptr(), column, scale, out.data_ptr(),
    )  # fmt: skip
    return out


def _library() -> Any:
    library = _native.library()
    assert library is not None
    return library
