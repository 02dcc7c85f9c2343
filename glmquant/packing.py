"""Bit packing, and nothing else: signed codes to the words of a file and back.

All functions are pure and work on whole rows. Without compiled kernels, two codes that share a byte are joined
inside an int16 view, one narrow operation per pair, which is several times faster than shifting one int32 per
code. The views assume a little-endian machine, as safetensors files do.
"""

from __future__ import annotations

import sys

import torch

from . import _native
from ._cuda import packing as on_gpu
from ._cuda.packing import Layout

if sys.byteorder != "little":  # pragma: no cover - no such machine runs torch wheels today
    raise ImportError("glmquant needs a little-endian machine")


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes -> ``code + 2**(bits-1)`` as uint8, contiguous."""
    # Zero points come transposed. Flat and back, because a column turned into a row counts as contiguous while
    # its row stride stays 1, and torch then refuses to view pairs of its items.
    flat = codes.reshape(-1)
    # adding 128 modulo 256 flips the top bit
    unsigned = flat.view(torch.uint8) ^ 0x80 if bits == 8 else (flat + 8).view(torch.uint8)
    return unsigned.view(codes.shape)


def _join_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 values 0..15 [rows, 2n] -> uint8 [rows, n]; the even column in the low half."""
    pairs = nibbles.view(torch.int16)  # low byte: even column, high byte: odd column
    return (pairs | (pairs >> 4)).to(torch.uint8)  # the cast keeps the low byte


def _split_nibbles(joined: torch.Tensor) -> torch.Tensor:
    """uint8 [n] -> uint8 values 0..15 [2n]; the inverse of `_join_nibbles`."""
    pairs = joined.to(torch.int16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)


def _compiled(kernel: str, data: torch.Tensor, out: torch.Tensor, count: int) -> torch.Tensor | None:
    """`out`, filled by a function of ``kernels/cpu`` from `count` bytes or pairs of `data`; None without kernels."""
    library = _native.library()
    if library is None or data.device.type != "cpu" or not data.is_contiguous():
        return None
    getattr(library, "glmquant_" + kernel)(data.data_ptr(), count, out.data_ptr())
    return out


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the last dimension, lowest bits first, as unsigned ``code + 2**(bits-1)``.

    Args:
        codes: int8 [rows, columns]; columns need not fill the last word (the rest is zero bits).
        bits: 4 or 8.

    Returns:
        int32 [rows, ceil(columns * bits / 32)].
    """
    if codes.is_cuda and (packed := on_gpu.pack(codes, bits, Layout.WORDS)) is not None:
        return packed
    per_word = 32 // bits
    if bits == 4 and codes.shape[1] % per_word == 0:
        words = codes.new_empty(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int32)
        packed = _compiled("pack_low_first", codes, words, codes.numel() // 2)
        if packed is not None:
            return packed
    unsigned = _unsigned(codes, bits)
    missing = -codes.shape[1] % per_word
    if missing:
        unsigned = torch.nn.functional.pad(unsigned, (0, missing))
    if bits == 4:  # four joined bytes are one little-endian word, lowest nibble first
        unsigned = _join_nibbles(unsigned)
    return unsigned.view(torch.int32)


def unpack_int32(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Inverse of `pack_int32`: int32 [rows, words] -> int8 [rows, columns]."""
    if words.is_cuda and (codes := on_gpu.unpack(words, columns, bits, Layout.WORDS)) is not None:
        return codes
    stored = words.reshape(-1).view(torch.uint8)  # flat as in `_unsigned`
    if bits == 8:
        signed = (stored ^ 0x80).view(torch.int8)
    else:
        codes = stored.new_empty(2 * len(stored), dtype=torch.int8)
        found = _compiled("unpack_low_first", stored, codes, len(stored))
        signed = found if found is not None else _split_nibbles(stored).view(torch.int8) - 8
    return signed.view(words.shape[0], words.shape[1] * 32 // bits)[:, :columns]


def pack_nibbles_high_first(codes: torch.Tensor) -> torch.Tensor:
    """THUDM's INT4 bytes: two's complement nibbles, the even column in the high half.

    Args:
        codes: int8 [rows, columns], columns even, values -8..7.

    Returns:
        int8 [rows, columns / 2].
    """
    if codes.is_cuda and (packed := on_gpu.pack(codes, 4, Layout.NIBBLES)) is not None:
        return packed
    codes = codes.contiguous()
    packed = codes.new_empty(codes.shape[0], codes.shape[1] // 2)
    found = _compiled("pack_high_first", codes, packed, packed.numel())
    if found is not None:
        return found
    pairs = codes.view(torch.int16)  # low byte: even column, high byte: odd column
    return ((pairs << 4) | ((pairs >> 8) & 0xF)).to(torch.int8)


def unpack_nibbles_high_first(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_nibbles_high_first`: int8 [rows, n] -> int8 [rows, 2n]."""
    columns = 2 * packed.shape[1]
    if packed.is_cuda and (codes := on_gpu.unpack(packed, columns, 4, Layout.NIBBLES)) is not None:
        return codes
    packed = packed.contiguous()
    codes = packed.new_empty(packed.shape[0], columns)
    found = _compiled("unpack_high_first", packed, codes, packed.numel())
    if found is not None:
        return found
    stored = packed.view(torch.uint8).to(torch.int16)
    nibbles = ((stored >> 4) | (stored << 8)) & 0x0F0F  # low byte: even column
    return (nibbles.view(torch.int8) ^ 8) - 8  # sign extension of four bits
