"""Bit packing: literal bytes, round trips, THUDM's golden bytes and compressed-tensors' own functions."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from helpers_formats import QUICK, golden_matrices
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glmquant.packing import (
    pack_int32,
    pack_nibbles_high_first,
    unpack_int32,
    unpack_nibbles_high_first,
)


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor as a file would hold them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    """Random signed codes of the whole range."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


@st.composite
def code_matrices(draw: st.DrawFn, bits: int, even: bool = False) -> Tensor:
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    return codes(rows, 2 * columns if even else columns, bits, draw(st.integers(0, 2**32)))


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [
        pytest.param(4, [-8, -7, -6, -5, -4, -3, -2, -1], "10325476", id="4bit-lowest-nibble-first"),
        pytest.param(4, [0, 1, 2, 3, 4, 5, 6, 7], "98badcfe", id="4bit-offset-8"),
        pytest.param(4, [7], "0f000000", id="4bit-rest-of-word-is-zero"),
        pytest.param(4, [-8] * 9, "0000000000000000", id="4bit-nine-columns-are-two-words"),
        pytest.param(8, [-128, -1, 0, 127], "007f80ff", id="8bit-offset-128"),
        pytest.param(8, [1, 2, 3, 4, 5], "8182838485000000", id="8bit-rest-of-word-is-zero"),
    ],
)
def test_int32_words_are_these_bytes(bits: int, row: list[int], expected: str) -> None:
    packed = pack_int32(torch.tensor([row], dtype=torch.int8), bits)
    assert packed.dtype == torch.int32
    assert raw(packed).hex() == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param([1, 2], "12", id="even-column-in-the-high-half"),
        pytest.param([-1, 0], "f0", id="two's-complement"),
        pytest.param([-8, 7, 7, -8], "8778", id="extremes"),
        pytest.param([0, -1, 3, -4], "0f3c", id="signs"),
    ],
)
def test_nibble_pairs_are_these_bytes(row: list[int], expected: str) -> None:
    packed = pack_nibbles_high_first(torch.tensor([row], dtype=torch.int8))
    assert packed.dtype == torch.int8
    assert raw(packed).hex() == expected


def test_all_nibble_pairs_equal_thudm() -> None:
    golden = golden_matrices()
    expected, packed = golden["packing.codes"], golden["packing.packed"]
    assert len({(int(a), int(b)) for a, b in expected.view(-1, 2)}) == 256
    assert torch.equal(pack_nibbles_high_first(expected), packed)
    assert torch.equal(unpack_nibbles_high_first(packed), expected)


@QUICK
@given(code_matrices(4, even=True))
def test_nibbles_come_back(matrix: Tensor) -> None:
    packed = pack_nibbles_high_first(matrix)
    assert packed.shape == (matrix.shape[0], matrix.shape[1] // 2)
    unpacked = unpack_nibbles_high_first(packed)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, matrix)


@QUICK
@given(code_matrices(4))
def test_4_bit_words_come_back(matrix: Tensor) -> None:
    assert torch.equal(unpack_int32(pack_int32(matrix, 4), 4, matrix.shape[1]), matrix)


@QUICK
@given(code_matrices(8))
def test_8_bit_words_come_back(matrix: Tensor) -> None:
    assert torch.equal(unpack_int32(pack_int32(matrix, 8), 8, matrix.shape[1]), matrix)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 64, 137])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_words_equal_those_of_compressed_tensors(bits: int, columns: int, rows: int) -> None:
    matrix = codes(rows, columns, bits)
    packed = pack_int32(matrix, bits)
    theirs = pack_to_int32(matrix, bits)
    assert torch.equal(packed, theirs)
    assert torch.equal(unpack_from_int32(packed, bits, matrix.shape), matrix)
    assert torch.equal(unpack_int32(theirs, bits, columns), matrix)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 32])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 64, 100])
def test_packing_along_rows_equals_compressed_tensors(bits: int, groups: int, rows: int) -> None:
    """Zero points are packed this way: transposed views go in and out."""
    matrix = codes(rows, groups, bits)
    packed = pack_int32(matrix.t(), bits).t()
    theirs = pack_to_int32(matrix, bits, packed_dim=0)
    assert torch.equal(packed, theirs)
    assert torch.equal(unpack_from_int32(packed.contiguous(), bits, matrix.shape, packed_dim=0), matrix)
    assert torch.equal(unpack_int32(theirs.t(), bits, rows).t(), matrix)


@QUICK
@given(code_matrices(4, even=True), st.integers(1, 20))
def test_rows_pack_one_by_one(matrix: Tensor, cut: int) -> None:
    """What a row becomes does not depend on the rows around it."""
    blocks = [block for block in (matrix[:cut], matrix[cut:]) if len(block)]
    assert torch.equal(torch.cat([pack_int32(b, 4) for b in blocks]), pack_int32(matrix, 4))
    nibbles = torch.cat([pack_nibbles_high_first(b) for b in blocks])
    assert torch.equal(nibbles, pack_nibbles_high_first(matrix))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda m: m[::2], id="every-other-row"),
        pytest.param(lambda m: m[:, 8:24], id="some-columns"),
        pytest.param(lambda m: m.t(), id="transposed"),
        pytest.param(lambda m: m[1:2], id="one-row"),
    ],
)
def test_views_pack_like_their_copies(view: object) -> None:
    matrix = codes(16, 32, 4)
    viewed = view(matrix)  # type: ignore[operator]
    before = matrix.clone()
    assert torch.equal(pack_int32(viewed, 4), pack_int32(viewed.clone().contiguous(), 4))
    assert torch.equal(pack_int32(viewed, 8), pack_int32(viewed.clone().contiguous(), 8))
    assert torch.equal(unpack_nibbles_high_first(pack_nibbles_high_first(viewed)), viewed)
    assert torch.equal(matrix, before), "packing must not write to its input"
