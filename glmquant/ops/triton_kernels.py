"""The Triton kernels for packed weights: a product with few activations, and the weights themselves.

They read the layout of `glmquant.ops.interleaved`, in which the two halves of a word, unpacked at once, are two
neighbouring weights in one register, as tensor cores take them. The bits of a code become those of a mantissa, so that
a weight costs about a shift, an ``and``, an ``or`` and half a subtraction, and no conversion.

Reading the weights is what takes the time, so a block has few of their rows (BLOCK_N) and all of their columns. Its
warps share the columns: each of SLICES takes every so many tiles, and the sums are added up in the end, always in the
same order. There are no atomics and no second launch, and a result never depends on timing.
"""

import triton
import triton.language as tl


@triton.jit
def _half(words, UPPER: tl.constexpr, DTYPE: tl.constexpr):
    bits = words >> 16 if UPPER else words
    return bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _less(number, by):
    # The compiler makes one 16-bit subtraction of it; Triton's interpreter has none for bfloat16.
    return (number.to(tl.float32) - by.to(tl.float32)).to(number.dtype)


@triton.jit
def _pair(words, zeros, RUN: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """[..., 2] of DTYPE: those codes of each word that belong to run RUN of its chunk, less the zero points `zeros`."""
    HALF: tl.constexpr = tl.float16 == DTYPE
    if BITS == 4:
        # 16 + code: 0x4C00 is 16 in half, where bit 6 counts 1, and 0x4180 in bfloat16, where bit 3 does.
        BIT: tl.constexpr = 6 if HALF else 3
        MASK: tl.constexpr = 0x03C003C0 if HALF else 0x00780078
        SIXTEEN: tl.constexpr = 0x4C004C00 if HALF else 0x41804180
        moved = words << (BIT - 4 * RUN) if 4 * RUN < BIT else words >> (4 * RUN - BIT)
        both = (moved & MASK) | SIXTEEN
        center = tl.full((), 24.0, tl.float32)
        low = _less(_less(_half(both, False, DTYPE), center), zeros)
        high = _less(_less(_half(both, True, DTYPE), center), zeros)
    else:
        # Seven bits in the mantissa of 1024 (half) or 128 (bfloat16), where bit 0 counts 1; the sign is worth -128.
        BASE: tl.constexpr = 0x64006400 if HALF else 0x43004300
        moved = words >> (8 * RUN)
        both = (moved & 0x007F007F) | BASE
        sign = (moved & 0x00800080) | BASE
        low = _less(_less(_half(both, False, DTYPE), _half(sign, False, DTYPE)), zeros)
        high = _less(_less(_half(both, True, DTYPE), _half(sign, True, DTYPE)), zeros)
    return tl.join(low, high)


@triton.jit
def _pairs_of_rows(table, group, within, n_block, N, STRIDE, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """int32 [groups, BLOCK_N / 2] of a table of 16-bit numbers: nothing smaller can be copied ahead of its use."""
    pair = n_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    at = table + group[:, None] * STRIDE + pair[None, :]
    if MASKED:
        both = tl.load(at, mask=within[:, None] & (pair < N // 2)[None, :], other=0)
    else:
        both = tl.load(at)
    return both


@triton.jit
def linear_kernel(
    x, packed, scale, zero, bias, y, M, N, K, CHUNKS, STRIDE,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, ASYMMETRIC: tl.constexpr, BIASED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes y [M, N] = x [M, K] @ weight [N, K].T + bias; a block computes BLOCK_N columns of y.

    STRIDE is that of the rows of `scale` and `zero`, in pairs.

    A step takes SLICES tiles of TILE chunks of 64 columns. GROUP is 32, a multiple of a tile, or 0 where a row is one.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    RUNS: tl.constexpr = 16 // BITS  # of a chunk, and codes in half a word
    LENGTH: tl.constexpr = 64 // RUNS  # columns in a run
    WIDTH: tl.constexpr = TILE * LENGTH
    WORDS: tl.constexpr = TILE * 2 * BITS

    n_block = tl.program_id(0)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    slices = tl.arange(0, SLICES)
    word = slices[:, None, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    words = packed + n[None, :, None] * (CHUNKS * 2 * BITS) + word
    run = tl.arange(0, WIDTH)
    column = (slices[:, None] * (TILE * 64) + run[None, :] // LENGTH * 64 + run[None, :] % LENGTH)[:, :, None]
    inputs = x + m[None, None, :] * K + column
    present = tl.broadcast_to(m[None, None, :] < M, (SLICES, WIDTH, BLOCK_M))

    total = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, tl.cdiv(CHUNKS, TILE * SLICES), num_stages=STAGES):
        chunk = step * (TILE * SLICES)
        left = CHUNKS - chunk
        if EVEN_N and EVEN_K:
            w = tl.load(words + chunk * (2 * BITS))
        elif EVEN_N:
            w = tl.load(words + chunk * (2 * BITS), mask=word < left * (2 * BITS), other=0)
        else:
            w = tl.load(
                words + chunk * (2 * BITS), mask=(word < left * (2 * BITS)) & (n < N)[None, :, None], other=0
            )
        part = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
        zeros = tl.zeros((), tl.float32)
        for r in tl.static_range(RUNS):
            if GROUP == 32:
                group = (chunk + slices * TILE) * 2 + r // (RUNS // 2)
            elif GROUP == 0:
                group = slices * 0
            else:
                group = (chunk + slices * TILE) * 64 // GROUP
            within = group * GROUP < K
            if ASYMMETRIC and (r == 0 or (GROUP == 32 and r == RUNS // 2)):
                z = _pairs_of_rows(zero, group, within, n_block, N, STRIDE, not (EVEN_N and EVEN_K), BLOCK_N)
                z = tl.join(z << 16 >> 16, z >> 16).reshape(SLICES, BLOCK_N)
                zeros = z.to(tl.float32).to(DTYPE)[:, :, None]
            v = _pair(w, zeros, r, BITS, DTYPE).reshape(SLICES, BLOCK_N, WIDTH)
            at = chunk * 64 + r * LENGTH
            if EVEN_K:
                a = tl.load(inputs + at, mask=present, other=0.0)
            else:
                a = tl.load(inputs + at, mask=present & (column < K - at), other=0.0)
            part = tl.dot(v, a, part)
            if r == RUNS - 1 or (GROUP == 32 and r == RUNS // 2 - 1):
                if SCALES == "float32":
                    inside = within[:, None] & (n < N)[None, :]
                    s = tl.load(scale + group[:, None] * (2 * STRIDE) + n[None, :], mask=inside, other=0.0)
                else:
                    s = _pairs_of_rows(
                        scale, group, within, n_block, N, STRIDE, not (EVEN_N and EVEN_K), BLOCK_N
                    )
                    if SCALES == "float16":
                        s = tl.join(_half(s, False, tl.float16), _half(s, True, tl.float16)).to(tl.float32)
                    else:
                        s = tl.join(s << 16, s & -65536).to(tl.float32, bitcast=True)
                    s = s.reshape(SLICES, BLOCK_N)
                total += part * s[:, :, None]
                part = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    result = tl.sum(total, axis=0)
    if BIASED:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], result.to(DTYPE), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def dequantize_kernel(
    packed, scale, zero, out, N, K, CHUNKS, STRIDE,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes out [N, K]; a block has BLOCK_N rows of TILE chunks. The product of code and scale is rounded once.

    STRIDE is that of the rows of `scale` and `zero`.
    """
    HALF: tl.constexpr = tl.bfloat16 if out.dtype.element_ty == tl.bfloat16 else tl.float16
    RUNS: tl.constexpr = 16 // BITS
    LENGTH: tl.constexpr = 64 // RUNS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * (TILE * 2 * BITS) + tl.arange(0, TILE * 2 * BITS)
    inside = (n < N)[:, None] & (word < CHUNKS * 2 * BITS)[None, :]
    w = tl.load(packed + n[:, None] * (CHUNKS * 2 * BITS) + word[None, :], mask=inside, other=0)
    run = tl.arange(0, TILE * LENGTH)
    for r in tl.static_range(RUNS):
        v = _pair(w, tl.zeros((), tl.float32), r, BITS, HALF).reshape(BLOCK_N, TILE * LENGTH).to(tl.float32)
        column = tl.program_id(1) * (TILE * 64) + run // LENGTH * 64 + r * LENGTH + run % LENGTH
        there = (n < N)[:, None] & (column < K)[None, :]
        at = (column // GROUP if GROUP else column * 0) * STRIDE
        if ASYMMETRIC:
            v -= tl.load(zero + at[None, :] + n[:, None], mask=there, other=0).to(tl.float32)
        v *= tl.load(scale + at[None, :] + n[:, None], mask=there, other=0.0).to(tl.float32)
        place = n[:, None].to(tl.int64) * K + column[None, :]
        tl.store(out + place, v.to(out.dtype.element_ty), mask=there)
