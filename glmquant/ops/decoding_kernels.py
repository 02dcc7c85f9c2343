"""The Triton kernels of a decoded token between its products; what they compute is in `glmquant.ops.decoding`.

They round where PyTorch's operations, one after the other, would, so that tokens do not depend on who computes them.
"""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x, delta, weight, out, EPSILON, COLUMNS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """A row each: x += delta where ADD; out = the RMS norm of x."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    at = tl.program_id(0) * COLUMNS + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = (value + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(DTYPE)
        tl.store(x + at, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / COLUMNS + EPSILON)
    normed = (value * scale).to(DTYPE).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (gain * normed).to(DTYPE), mask=inside)


@triton.jit
def silu_kernel(both, out, COLUMNS, BLOCK: tl.constexpr):
    """Writes out [rows, COLUMNS] = silu(first half) * second half of a row of `both`."""
    DTYPE: tl.constexpr = both.dtype.element_ty
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    gate = tl.load(both + row * (2 * COLUMNS) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * (2 * COLUMNS) + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out + row * COLUMNS + column, (gate * up).to(DTYPE), mask=inside)


@triton.jit
def rotate_kernel(
    qkv, cos, sin, query, keys, values, column, HEADS, GROUPS, CAPACITY, ROTARY,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """A head of a sequence each: queries and keys are rotated, keys and values go to the `column` of their caches.

    Heads are 2*PAIRS wide, ROTARY pairs of which are rotated.
    """
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    source = qkv + (row * (HEADS + 2 * GROUPS) + head) * (2 * PAIRS) + 2 * pair
    even = tl.load(source).to(tl.float32)
    odd = tl.load(source + 1).to(tl.float32)
    place = (row * GROUPS * CAPACITY + tl.load(column)) * (2 * PAIRS) + 2 * pair
    if head >= HEADS + GROUPS:
        target = values + place + (head - HEADS - GROUPS) * CAPACITY * (2 * PAIRS)
        tl.store(target, even.to(DTYPE))
        tl.store(target + 1, odd.to(DTYPE))
    else:
        rotated = pair < ROTARY
        c = tl.load(cos + row * (2 * ROTARY) + pair, mask=rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + row * (2 * ROTARY) + pair, mask=rotated, other=0.0).to(tl.float32)
        first = (even * c).to(DTYPE).to(tl.float32) - (odd * s).to(DTYPE).to(tl.float32)
        second = (odd * c).to(DTYPE).to(tl.float32) + (even * s).to(DTYPE).to(tl.float32)
        if head < HEADS:
            target = query + (row * HEADS + head) * (2 * PAIRS) + 2 * pair
        else:
            target = keys + place + (head - HEADS) * CAPACITY * (2 * PAIRS)
        tl.store(target, first.to(DTYPE))
        tl.store(target + 1, second.to(DTYPE))


@triton.jit
def attention_kernel(
    query, keys, values, first, column, sums, maxima, totals, SCALE, GROUPS, CAPACITY,
    PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One of PARTS stretches of the cached columns ``first..column``, for all query heads of a group.

    Writes what the softmax needs to be put together: weighted sums [rows, groups, PARTS, PER_GROUP, WIDTH], maxima and
    totals [rows, groups, PARTS, PER_GROUP], of powers of two.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    both, part = tl.program_id(0), tl.program_id(1)  # both: row and group
    begin = tl.load(first + both // GROUPS).to(tl.int32)
    end = tl.load(column).to(tl.int32) + 1
    stretch = tl.cdiv(tl.cdiv(end - begin, PARTS), BLOCK) * BLOCK
    begin += part * stretch
    end = tl.minimum(end, begin + stretch)
    head, d, block = tl.arange(0, BLOCK_H), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    real = head < PER_GROUP
    at = (both * PER_GROUP + head)[:, None] * WIDTH + d[None, :]
    q = tl.load(query + at, mask=real[:, None], other=0.0)
    cache = both.to(tl.int64) * CAPACITY * WIDTH
    largest = tl.full((BLOCK_H,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    summed = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    for start in tl.range(begin, end, BLOCK):
        here = start + block
        there = (here < end)[:, None]
        k = tl.load(keys + cache + here[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        v = tl.load(values + cache + here[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k)) * (SCALE * 1.4426950408889634)
        score = tl.where((here < end)[None, :], score, -1e30)
        new = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - new)
        weight = tl.where((here < end)[None, :], tl.exp2(score - new[:, None]), 0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        summed = summed * shrink[:, None] + tl.dot(weight.to(DTYPE), v)
        largest = new
    place = (both * PARTS + part) * PER_GROUP + head
    tl.store(sums + place[:, None] * WIDTH + d[None, :], summed, mask=real[:, None])
    tl.store(maxima + place, largest, mask=real)
    tl.store(totals + place, total, mask=real)


@triton.jit
def merge_kernel(
    sums, maxima, totals, out, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """Writes out [rows, groups, PER_GROUP, WIDTH] from what `attention_kernel` wrote: a head each, parts in order."""
    both, head = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    place = (both * PARTS + part) * PER_GROUP + head
    largest = tl.load(maxima + place)
    share = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.sum(share * tl.load(totals + place), axis=0)
    value = tl.load(sums + place[:, None] * WIDTH + d[None, :])
    result = tl.sum(share[:, None] * value, axis=0) / total
    tl.store(out + (both * PER_GROUP + head) * WIDTH + d, result.to(out.dtype.element_ty))
