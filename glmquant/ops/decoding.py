"""What a token needs between the products when it is decoded: norms, rotary positions, attention to a static cache.

Each is one launch on a GPU (`glmquant.ops.decoding_kernels`), where PyTorch's own operations are five to ten, and one
call on a CPU (`glmquant.ops.decoding_native`); where neither can be had it is PyTorch's. `chosen` decides. All round at
the same places. What changes from token to token is read from memory, so that a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor
from torch.nn import functional

from . import decoding_native, triton

PARTS = 64
"""Pieces into which attention on a GPU cuts the columns of a sequence, so that they fill the multiprocessors."""


class By(Enum):
    """What computes."""

    TRITON = auto()
    COMPILED = auto()
    TORCH = auto()


def chosen(device: torch.device) -> By:
    """The fastest that works on a device."""
    if triton.why_not(device) is None:
        return By.TRITON
    return By.COMPILED if decoding_native.why_not(device) is None else By.TORCH


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, and where its sequences are.

    Attributes:
        keys: [rows, groups, capacity, width].
        values: the same.
        first: int64 [rows], the first column of a sequence that is not padding.
        column: int64 [1], the column of the token at hand, for all rows.
        length: ``column + 1`` where the host knows it, to read no more than that; None on a GPU.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    column: Tensor
    length: int | None = None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None = None) -> Tensor:
    """The norm of ``x + delta``, [rows, columns]; x becomes that sum, in place."""
    by = chosen(x.device)
    if by is By.COMPILED:
        return decoding_native.rms_norm(x, weight, epsilon, delta)
    if by is By.TORCH:
        if delta is not None:
            x.add_(delta)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return weight * wide.to(x.dtype)
    from .decoding_kernels import norm_kernel

    rows, columns = x.shape
    out = torch.empty_like(x)
    block = 1 << (columns - 1).bit_length()
    norm_kernel[(rows,)](
        x, x if delta is None else delta, weight, out, epsilon,
        COLUMNS=columns, ADD=delta is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


def silu_product(both: Tensor) -> Tensor:
    """[rows, 2n] -> silu(first half) * second half, [rows, n]."""
    by = chosen(both.device)
    if by is By.COMPILED:
        return decoding_native.silu_product(both)
    if by is By.TORCH:
        gate, up = both.chunk(2, dim=-1)
        return up * functional.silu(gate)
    from .decoding_kernels import silu_kernel

    rows, columns = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, columns)
    silu_kernel[(rows, -(-columns // 1024))](both, out, columns, BLOCK=1024)
    return out


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, cache: Cache) -> Tensor:
    """Turn queries and keys by their position, and put keys and values into the cache.

    Args:
        qkv: [rows, (heads + 2 * groups) * width].
        cos: [rows, rotary], whose first half is for the pairs (0, 1), (2, 3), ... of a head.
        sin: the same.
        heads: of the queries.
        cache: where keys and values go.

    Returns:
        The queries, [rows, heads, width].
    """
    rows, (_, groups, capacity, width) = qkv.shape[0], cache.keys.shape
    by = chosen(qkv.device)
    if by is By.COMPILED:
        columns = cache.column.expand(rows).contiguous()
        return decoding_native.rotate_and_store(qkv, cos, sin, heads, cache.keys, cache.values, columns)
    if by is By.TORCH:
        q, k, v = torch.split(qkv.view(rows, -1, width), [heads, groups, groups], dim=1)
        cache.keys.index_copy_(2, cache.column, _rotated(k, cos, sin)[:, :, None])
        cache.values.index_copy_(2, cache.column, v[:, :, None])
        return _rotated(q, cos, sin)
    from .decoding_kernels import rotate_kernel

    query = qkv.new_empty(rows, heads, width)
    rotate_kernel[(rows, heads + 2 * groups)](
        qkv, cos, sin, query, cache.keys, cache.values, cache.column, heads, groups, capacity, cos.shape[1] // 2,
        PAIRS=width // 2, num_warps=1,
    )  # fmt: skip
    return query


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    even, odd = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def attend(query: Tensor, cache: Cache, scale: float) -> Tensor:
    """Attention of one token of each row [rows, heads, width] to its columns -> [rows, heads * width]."""
    rows, heads, width = query.shape
    _, groups, capacity, _ = cache.keys.shape
    by = chosen(query.device)
    if by is By.COMPILED:
        last = cache.column.expand(rows).contiguous()
        return decoding_native.attend(query, cache.keys, cache.values, last, scale, first=cache.first)
    if by is By.TORCH:
        length = capacity if cache.length is None else cache.length
        columns = torch.arange(length, device=query.device)
        seen = (columns >= cache.first[:, None]) & (columns <= cache.column)
        # The heads that share keys are queries of one head, which needs no copies of the keys.
        grouped = functional.scaled_dot_product_attention(
            query.view(rows, groups, heads // groups, width),
            cache.keys[:, :, :length],
            cache.values[:, :, :length],
            seen[:, None, None],
            scale=scale,
        )
        return grouped.reshape(rows, heads * width)
    from .decoding_kernels import attention_kernel, merge_kernel

    per_group = heads // groups
    sums = torch.empty(rows, groups, PARTS, per_group, width, dtype=torch.float32, device=query.device)
    maxima = sums.new_empty(rows, groups, PARTS, per_group)
    totals = torch.empty_like(maxima)
    out = torch.empty_like(query)
    attention_kernel[(rows * groups, PARTS)](
        query, cache.keys, cache.values, cache.first, cache.column, sums, maxima, totals, scale, groups, capacity,
        PER_GROUP=per_group, WIDTH=width, BLOCK_H=max(16, 1 << (per_group - 1).bit_length()), BLOCK=64, PARTS=PARTS,
    )  # fmt: skip
    merge_kernel[(rows * groups, per_group)](
        sums, maxima, totals, out, PER_GROUP=per_group, WIDTH=width, PARTS=PARTS
    )
    return out.view(rows, heads * width)
