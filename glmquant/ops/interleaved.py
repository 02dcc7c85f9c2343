"""The layout that the Triton kernels read: the same codes in the same number of bytes, in another order.

A row of the weight is cut into chunks of 64 columns, of 2*b words for b-bit codes (the last one is filled up), and a
chunk into 16/b runs of adjacent columns. Word t of a chunk holds two neighbours of every run:

    4 bits, run r = columns 16r..16r+15      8 bits, run r = columns 32r..32r+31
    bits  4r .. 4r+3    column 16r + 2t      bits  8r .. 8r+7    column 32r + 2t
    bits 16+4r .. +3    column 16r + 2t+1    bits 16+8r .. +7    column 32r + 2t+1
    stored: code + 8                         stored: code, two's complement

so that a run is unpacked from all words of its chunk with one shift, into pairs that lie as two 16-bit floating-point
numbers lie in a register. Scales and zero points are transposed, as neighbouring rows are computed together.

    weight_packed      int32 [out, chunks, 2*b]; the third dimension tells it from the layout of `glmquant.ops.linear`
    weight_scale       [groups, out]
    weight_zero_point  int16 [groups, out], or None
"""

from __future__ import annotations

import torch

from ..packing import pack_int32, unpack_int32
from .weight import Weight

CHUNK = 64
"""Columns in a chunk."""

_BLOCK = 1 << 24  # weights that are rearranged at a time


def interleave(weight: Weight, bits: int, columns: int) -> Weight:
    """From the layout of `glmquant.ops.linear` to this one.

    Args:
        weight: [out, in], out even.
        bits: 4 or 8.
        columns: its width, in.
    """
    rows = weight.packed.shape[0]
    chunks, runs = -(-columns // CHUNK), 16 // bits
    packed = weight.packed.new_empty(rows, chunks, 2 * bits)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        codes = unpack_int32(weight.packed[start : start + step], bits, columns)
        codes = torch.nn.functional.pad(codes, (0, chunks * CHUNK - columns))
        #                               chunk,  run,  word,     half -> chunk, word, half, run
        ordered = codes.view(-1, chunks, runs, 2 * bits, 2).permute(0, 1, 3, 4, 2).reshape(len(codes), -1)
        packed[start : start + step] = pack_int32(ordered, bits).view(-1, chunks, 2 * bits)
    if bits == 8:
        packed ^= _SIGNS
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = zero_point.t().to(torch.int16, memory_format=torch.contiguous_format)
    return Weight(packed, weight.scale.t().contiguous(), zero_point)


def restore(weight: Weight, bits: int, columns: int) -> Weight:
    """The inverse of `interleave`."""
    rows, chunks, words = weight.packed.shape
    packed = weight.packed.new_empty(rows, -(-columns * bits // 32))
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        block = weight.packed[start : start + step].flatten(1)
        codes = unpack_int32(block ^ _SIGNS if bits == 8 else block, bits, chunks * CHUNK)
        codes = codes.view(-1, chunks, words, 2, 16 // bits).permute(0, 1, 4, 2, 3).reshape(len(codes), -1)
        packed[start : start + step] = pack_int32(codes[:, :columns].contiguous(), bits)
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = zero_point.t().to(torch.int8, memory_format=torch.contiguous_format)
    return Weight(packed, weight.scale.t().contiguous(), zero_point)


_SIGNS = -0x7F7F7F80  # 0x80808080: what tells code + 128 from two's complement
