"""How large caches of keys and values are: arithmetic, and the sizes of those that `generate` keeps on a GPU."""

from __future__ import annotations

from .checkpoint.source import ITEM_SIZES
from .families import Dims

ROOM = 512
"""Tokens of an answer that a cache on a GPU has room for at first, unless the answer is known to be shorter."""

_UNIT = 256  # columns that such a cache is a multiple of


def cache_bytes(dims: Dims, tokens: int, dtype: str) -> int:
    """Keys and values: 2 * layers * KV heads * head size * tokens * bytes.

    In ChatGLM-6B every head has keys and values of its own.

    Args:
        dims: of the model.
        tokens: of all sequences together.
        dtype: of the cache, as safetensors spells it.
    """
    return 2 * dims.layers * dims.kv_heads * dims.head_dim * ITEM_SIZES[dtype] * tokens


def capacity_for(columns: int) -> int:
    """Columns of a cache in which there is room for so many."""
    return -(-columns // _UNIT) * _UNIT


def grown(capacity: int, longest: int) -> int:
    """Columns of a full cache of `capacity` after it has grown: twice as many, or what `longest` tokens need."""
    return min(2 * capacity, max(capacity_for(longest), capacity + _UNIT))


def capacities(prompt: int, longest: int) -> list[int]:
    """Columns of a cache from a prompt of so many tokens to an answer that ends at `longest`, as it grows."""
    found = [capacity_for(min(longest, prompt + ROOM))]
    while found[-1] < longest:
        found.append(grown(found[-1], longest))
    return found
