"""A decoded token on a CPU: the compiled kernels against PyTorch's operations, and generating with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glmquant.errors import UsageError
from glmquant.ops import decoding as ops
from glmquant.ops import decoding_native

pytestmark = pytest.mark.skipif(
    decoding_native.why_not() is not None, reason=f"no compiled kernels: {decoding_native.why_not()}"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-18}
"""One rounding, relative to a number; float32 has some more, because sums are added up in another order."""


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    """Compute something with the kernels, then with PyTorch."""
    assert ops.chosen(torch.device("cpu")) is ops.By.COMPILED
    found = compute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "chosen", lambda device: ops.By.TORCH)
        return found, compute()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 96, 257, 4096])
def test_norm(columns: int, dtype: torch.dtype) -> None:
    def compute() -> tuple[Tensor, Tensor]:
        x = random(3, columns, dtype=dtype)
        return ops.rms_norm(x, random(columns, dtype=dtype), 1e-5, random(3, columns, dtype=dtype) * 2), x

    found, expected = both(compute)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=2 * STEP[dtype], atol=1e-6)
    found, expected = both(
        lambda: ops.rms_norm(random(2, columns, dtype=dtype), torch.ones(columns, dtype=dtype), 1e-5)
    )
    torch.testing.assert_close(found, expected, rtol=STEP[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 37), (2, 256), (1, 13696), (4, 1100)])
def test_silu(rows: int, columns: int, dtype: torch.dtype) -> None:
    found, expected = both(lambda: ops.silu_product(random(rows, 2 * columns, dtype=dtype) * 4))
    torch.testing.assert_close(found, expected, rtol=2 * STEP[dtype], atol=1e-6)


def test_silu_of_extremes() -> None:
    gate = torch.tensor(
        [-3e38, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 3e38, float("inf"), float("nan")]
    )
    found, expected = both(lambda: ops.silu_product(torch.cat((gate, torch.ones_like(gate)))[None]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "rotary"), [(4, 2, 32, 16), (3, 1, 16, 16), (4, 4, 8, 4), (32, 2, 128, 64)]
)
def test_positions(heads: int, groups: int, width: int, rotary: int, dtype: torch.dtype) -> None:
    angles = random(2, rotary // 2, dtype=torch.float32) * 3
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angles.cos(), angles.sin()))

    def compute() -> tuple[Tensor, ...]:
        keys = torch.zeros(2, groups, 6, width, dtype=dtype)
        cache = ops.Cache(keys, keys.clone(), torch.zeros(2, dtype=torch.int64), torch.tensor([4]), 5)
        query = ops.rotate_and_store(
            random(2, (heads + 2 * groups) * width, dtype=dtype), cos, sin, heads, cache
        )
        return query, cache.keys, cache.values

    found, expected = both(compute)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert bool(found[1][:, :, 4].any())
    assert not bool(found[1][:, :, [0, 1, 2, 3, 5]].any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 5, 63, 64, 255, 256, 700])
def test_attention(column: int, dtype: torch.dtype) -> None:
    """Few columns and many, for 16 heads to a group and for fewer, with padding; nothing else in the cache is read."""
    for heads, groups, width in ((16, 1, 32), (6, 2, 40), (4, 4, 7)):
        keys, values = (random(2, groups, 701, width + n, dtype=dtype)[..., n:].contiguous() for n in (0, 1))
        for t in (keys, values):
            t[:, :, column + 1 :] = float("nan")
            t[1, :, : column // 2] = float("nan")
        first = torch.tensor([0, column // 2])
        query = random(2, heads, width, dtype=dtype) * 4
        cache = ops.Cache(keys, values, first, torch.tensor([column]), column + 1)
        found = ops.attend(query, cache, 0.2)
        for row in range(2):
            here = slice(int(first[row]), column + 1)
            k, v = (t[row, :, here].repeat_interleave(heads // groups, 0).double() for t in (keys, values))
            weights = torch.softmax(0.2 * (query[row].double()[:, None] @ k.transpose(1, 2)), -1)
            expected = (weights @ v).flatten()
            torch.testing.assert_close(found[row].double(), expected, rtol=STEP[dtype], atol=STEP[dtype])


def test_attention_to_nan_is_nan() -> None:
    keys = random(1, 1, 300, 16, dtype=torch.float32)
    values = keys.clone()
    keys[0, 0, 7, 3] = float("nan")
    cache = ops.Cache(keys, values, torch.zeros(1, dtype=torch.int64), torch.tensor([299]), 300)
    assert bool(ops.attend(random(1, 2, 16, dtype=torch.float32), cache, 1.0).isnan().all())


def test_as_many_threads_as_you_like() -> None:
    """Attention is merged in the order of its pieces."""
    keys = random(2, 2, 1500, 32, dtype=torch.float16)
    cache = ops.Cache(keys, keys + 1, torch.tensor([0, 300]), torch.tensor([1499]), 1500)
    query, before, found = random(2, 8, 32, dtype=torch.float16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.attend(query, cache, 0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_would_be_read_wrong_is_refused() -> None:
    half, single = (random(2, 4, 16, dtype=dtype) for dtype in (torch.float16, torch.float32))
    with pytest.raises(UsageError, match="of one dtype"):
        decoding_native.rms_norm(half[0], single[0, 0], 1e-5, None)
    with pytest.raises(UsageError, match="of one dtype"):
        decoding_native.rms_norm(half[0], half[0, 0], 1e-5, single[0])
    keys = random(2, 2, 9, 16, dtype=torch.float16)
    last, slots = torch.tensor([3, 3]), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="of one dtype"):
        decoding_native.attend(single, keys, keys, last, 1.0, slots=slots)
    for caches in ((keys.transpose(2, 3), keys), (keys, keys.transpose(2, 3))):
        with pytest.raises(UsageError, match="contiguous"):
            decoding_native.attend(half, *caches, last, 1.0, slots=slots)


def test_attention_of_rows_in_slots() -> None:
    """Rows of different lengths, in slots of a larger cache: each as if it were alone."""
    keys, values = (random(5, 2, 400, 16 + n, dtype=torch.float16)[..., n:].contiguous() for n in (0, 1))
    query, slots = random(3, 6, 16, dtype=torch.float16), torch.tensor([4, 0, 2])
    last = torch.tensor([0, 300, 57])
    found = decoding_native.attend(query, keys, values, last, 0.4, slots=slots)
    for row, (slot, column) in enumerate(zip(slots.tolist(), last.tolist(), strict=True)):
        k, v = (t[slot : slot + 1, :, : column + 1].contiguous() for t in (keys, values))
        alone = ops.Cache(k, v, torch.zeros(1, dtype=torch.int64), torch.tensor([column]), column + 1)
        assert torch.equal(found[row : row + 1], ops.attend(query[row : row + 1], alone, 0.4))
