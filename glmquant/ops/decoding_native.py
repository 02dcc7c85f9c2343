"""The functions of `glmquant.ops.decoding` by the compiled CPU kernels (``kernels/cpu/decode.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._floats import FLOATS
from ..errors import UsageError

_CPU = torch.device("cpu")


def why_not(device: torch.device = _CPU) -> str | None:
    """Why they cannot be used on a device, as a sentence without its full stop; None where they can."""
    return _native.why_not() if device.type == "cpu" else f"they are for a CPU, and this is {device.type}"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None) -> Tensor:
    """See `glmquant.ops.decoding.rms_norm`; x is contiguous."""
    check([x, weight], x if delta is None else delta)
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


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """Turn queries and keys by their position, and put keys and values into a cache.

    Args:
        qkv: [rows, (heads + 2 * groups) * width].
        cos: see `glmquant.ops.decoding.rotate_and_store`.
        sin: the same.
        heads: of the queries.
        keys: [slots, groups, capacity, width], contiguous.
        values: the same.
        columns: int64 [rows], where in its slot each row goes.
        slots: int64 [rows]; None where row i is in slot i.

    Returns:
        The queries, [rows, heads, width].
    """
    rows, (_, groups, capacity, width) = qkv.shape[0], keys.shape
    check([keys, values], qkv, cos, sin)
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    query = qkv.new_empty(rows, heads, width)
    _library().glmquant_rotate(
        qkv.data_ptr(), FLOATS[qkv.dtype], rows, heads, groups, width, cos.data_ptr(), sin.data_ptr(),
        cos.shape[1], cos.shape[1] // 2, query.data_ptr(), keys.data_ptr(), values.data_ptr(), capacity,
        None if slots is None else slots.data_ptr(), columns.data_ptr(),
    )  # fmt: skip
    return query


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    last: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of one token of each row, which may be in any slot of a cache.

    Args:
        query: [rows, heads, width].
        keys: [slots, groups, capacity, width], contiguous.
        values: the same.
        last: int64 [rows], the column of each row's token.
        scale: of the products of queries and keys.
        first: int64 [rows], each row's first column; None for 0.
        slots: int64 [rows]; None where row i is in slot i.

    Returns:
        [rows, heads * width]. A row's does not depend on the others, nor on the number of threads.
    """
    rows, heads, width = query.shape
    _, groups, capacity, _ = keys.shape
    check([keys, values], query)
    query, out = query.contiguous(), query.new_empty(rows, heads * width)
    _library().glmquant_attend(
        query.data_ptr(), FLOATS[query.dtype], rows, heads, groups, width, keys.data_ptr(), values.data_ptr(),
        capacity, None if slots is None else slots.data_ptr(), None if first is None else first.data_ptr(),
        last.data_ptr(), scale, out.data_ptr(),
    )  # fmt: skip
    return out


def check(in_place: list[Tensor], *others: Tensor) -> None:
    """Refuse what would be read as another dtype, or at places that are not there.

    Args:
        in_place: must be contiguous.
        others: are copied where they are not.

    Raises:
        UsageError: they are of several dtypes, or not contiguous.
    """
    if any(not t.is_contiguous() or t.dtype != in_place[0].dtype for t in in_place) or any(
        other.dtype != in_place[0].dtype for other in others
    ):
        raise UsageError(
            "the kernels for decoding take tensors of one dtype, and caches that are contiguous."
        )


def _library() -> Any:
    library = _native.library()
    assert library is not None
    return library
