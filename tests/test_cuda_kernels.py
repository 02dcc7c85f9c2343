"""The CUDA kernels, run on a CPU, against the quantizers and formats: the same bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers_cuda import kernels_on_cpu as kernels_on_cpu
from helpers_cuda import needs_shim
from helpers_formats import MATRICES, QUICK, WEIGHT_KINDS, golden_matrices, random_weight, same_bytes
from hypothesis import HealthCheck, given, settings
from test_native import odd_weights, refusal
from torch import Tensor

from glmquant import formats
from glmquant._cuda import packing
from glmquant._cuda.packing import Layout
from glmquant._quantize import _squared_sums
from glmquant.packing import (
    pack_int32,
    pack_nibbles_high_first,
    unpack_int32,
    unpack_nibbles_high_first,
)
from glmquant.quantizers import QUANTIZERS, LeastSquares, cuda, native
from glmquant.scheme import QuantizedTensor, Scheme

pytestmark = [needs_shim, pytest.mark.usefixtures("kernels_on_cpu")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METHODS = {
    "rtn": native.Method.NEAREST,
    "mse": native.Method.LEAST_SQUARES,
    "thudm": native.Method.THUDM,
}
# A test changes nothing that the next example of hypothesis would see.
MANY = settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])


def search_of(method: str, columns: int, scheme: Scheme) -> native.Search:
    quantizer = QUANTIZERS[method]
    return (
        quantizer._candidates(columns, scheme) if isinstance(quantizer, LeastSquares) else native._NO_SEARCH
    )


def by_kernel(weight: Tensor, scheme: Scheme, method: str) -> QuantizedTensor | None:
    return cuda.quantize(weight, scheme, METHODS[method], search_of(method, weight.shape[1], scheme))


def assert_same(weight: Tensor, scheme: Scheme, method: str) -> None:
    expected, found = QUANTIZERS[method](weight, scheme), by_kernel(weight, scheme, method)
    assert found is not None
    assert same_bytes(found.scale, expected.scale)
    assert torch.equal(found.codes, expected.codes)
    assert (found.zero_point is None) == (expected.zero_point is None)
    if expected.zero_point is not None:
        assert torch.equal(found.zero_point, expected.zero_point)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_same_bytes(method: str, bits: int, group: int | None, dtype: torch.dtype) -> None:
    for kind, symmetric, scale_dtype in itertools.product(
        WEIGHT_KINDS, (True, False), ("float16", "bfloat16", "float32")
    ):
        weight = random_weight(kind, 12, 640).to(dtype)
        assert_same(weight, Scheme(bits, group, symmetric, scale_dtype), method)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_same_bytes_thudm(kind: str, bits: int) -> None:
    assert_same(random_weight(kind, 64, 640), Scheme(bits), "thudm")


@pytest.mark.parametrize("dtype", ["", "_bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_edge_rows(method: str, matrix: str, bits: int, dtype: str) -> None:
    """Zeros, subnormals, single weights, rows whose scale is rounded badly."""
    weight = golden_matrices()[f"{matrix}.weight{dtype}"]
    for row in weight.split(1):
        if refusal(row, Scheme(bits), method) is None:
            assert_same(row, Scheme(bits), method)
        else:
            assert by_kernel(row, Scheme(bits), method) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", MATRICES)
def test_golden_bytes(matrix: str, bits: int) -> None:
    """What THUDM's own code made, but for rows that it leaves undefined or wraps."""
    golden = golden_matrices()
    weight, layout = golden[f"{matrix}.weight"], Layout.NIBBLES if bits == 4 else Layout.CODES
    assert_same(weight, Scheme(bits), "thudm")
    packed, scale, _ = cuda.quantize_packed(
        weight, Scheme(bits), native.Method.THUDM, native._NO_SEARCH, layout
    )
    expected, usual = golden[f"{matrix}.int{bits}.weight"], slice(None)
    if matrix in ("edge_rows", "undefined_rows"):
        usual = (packed == expected).all(1)
        assert usual.sum() >= len(weight) // 2
    assert torch.equal(packed[usual], expected[usual])
    assert same_bytes(scale.flatten()[usual], golden[f"{matrix}.int{bits}.weight_scale"][usual])


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 255, 256, 257, 300, 4096, 13696])
@pytest.mark.parametrize("method", ["rtn", "mse", "thudm"])
def test_rows_of_any_width(method: str, columns: int) -> None:
    for bits, symmetric in itertools.product((4, 8), (True, False)):
        if symmetric or method != "thudm":
            assert_same(random_weight("heavy-tail", 3, columns), Scheme(bits, None, symmetric), method)


@pytest.mark.parametrize("columns", [256, 4096, 13696])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_as_large_as_they_get(bits: int, columns: int) -> None:
    """Every weight is an extreme, so that every product has the largest code and the largest value."""
    for symmetric in (True, False):
        weight = torch.full((2, columns), 0.37, dtype=torch.float16)
        weight[1, ::2] *= -1
        assert_same(weight, Scheme(bits, None, symmetric), "mse")


@MANY
@given(odd_weights())
def test_same_bytes_for_any_pattern(case: tuple[Tensor, Scheme, str]) -> None:
    weight, scheme, method = case
    if refusal(weight, scheme, method) is None:
        assert_same(weight, scheme, method)
    else:
        assert by_kernel(weight, scheme, method) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "mse", "thudm"])
def test_what_cannot_be_quantized_is_left_to_torch(method: str, value: float) -> None:
    weight = random_weight("gaussian", 8, 128)
    weight[3, 5] = value
    assert by_kernel(weight, Scheme(4), method) is None
    large = torch.full((2, 64), 1e6, dtype=torch.bfloat16)
    assert by_kernel(large, Scheme(4), method) is None  # a scale beyond half


def test_weights_that_a_kernel_cannot_take() -> None:
    weight = random_weight("gaussian", 8, 256)
    assert by_kernel(weight[:, ::2], Scheme(4), "rtn") is None
    assert by_kernel(weight[:0], Scheme(4), "rtn") is None
    assert by_kernel(weight[:, :0], Scheme(4), "rtn") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_weights(dtype: torch.dtype) -> None:
    """Rows that start anywhere, as in a view of a larger tensor."""
    flat = random_weight("gaussian", 1, 8 * 64 + 3).to(dtype).flatten()
    for start in range(4):
        weight = flat[start : start + 8 * 63].view(8, 63)
        assert weight.is_contiguous()
        assert_same(weight, Scheme(4), "mse")


LAYOUTS = [(Layout.WORDS, 4), (Layout.WORDS, 8), (Layout.NIBBLES, 4), (Layout.CODES, 8), (Layout.CODES, 4)]


def packed_by_torch(codes: Tensor, bits: int, layout: Layout) -> Tensor:
    if layout is Layout.WORDS:
        return pack_int32(codes, bits)
    return pack_nibbles_high_first(codes) if layout is Layout.NIBBLES else codes


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("columns", [2, 6, 8, 14, 30, 64, 130])
@pytest.mark.parametrize(("layout", "bits"), LAYOUTS)
def test_packing(layout: Layout, bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    expected = packed_by_torch(codes, bits, layout)
    packed = packing.pack(codes, bits, layout)
    assert packed is not None
    assert same_bytes(packed, expected)
    assert torch.equal(packing.unpack(packed, columns, bits, layout), codes)
    assert torch.equal(packing.pack(codes.t().contiguous().t(), bits, layout), expected)


@pytest.mark.parametrize("columns", [1, 7, 9, 31])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_odd_widths(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    packed = packing.pack(codes, bits, Layout.WORDS)
    assert same_bytes(packed, pack_int32(codes, bits))
    assert torch.equal(packing.unpack(packed, columns, bits, Layout.WORDS), codes)


def test_every_byte_of_two_nibbles() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    words = every.view(torch.int32)
    assert torch.equal(packing.unpack(words, 512, 4, Layout.WORDS), unpack_int32(words, 4, 512))
    nibbles = every.view(torch.int8)
    codes = packing.unpack(nibbles, 512, 4, Layout.NIBBLES)
    assert torch.equal(codes, unpack_nibbles_high_first(nibbles))
    assert torch.equal(packing.pack(codes, 4, Layout.NIBBLES), nibbles)


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(("layout", "bits"), LAYOUTS)
def test_quantized_and_packed_at_once(layout: Layout, bits: int, group: int | None) -> None:
    weight, scheme = random_weight("laplace", 9, 96), Scheme(bits, group)
    search = search_of("mse", 96, scheme)
    found = cuda.quantize_packed(weight, scheme, native.Method.LEAST_SQUARES, search, layout)
    expected = QUANTIZERS["mse"](weight, scheme)
    assert found is not None
    assert same_bytes(found[0], packed_by_torch(expected.codes, bits, layout))
    assert same_bytes(found[1], expected.scale)


@pytest.mark.parametrize("name", ["cpm", "compressed-tensors"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_are_those_of_the_formats(name: str, bits: int) -> None:
    quantized = QUANTIZERS["rtn"](random_weight("gaussian", 8, 64), Scheme(bits))
    layout = Layout.WORDS if name == "compressed-tensors" else Layout.NIBBLES if bits == 4 else Layout.CODES
    stored = next(iter(formats.get(name).encode("x.weight", quantized).values()))
    assert same_bytes(packing.pack(quantized.codes, bits, layout), stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("layout", "bits"), LAYOUTS)
def test_dequantizing(layout: Layout, bits: int, scale_dtype: str, dtype: torch.dtype) -> None:
    for columns, groups, symmetric in itertools.product((36, 128), (1, 4), (True, False)):
        codes = random_codes(6, columns, bits)
        scale = (torch.randn(6, groups) * 3).to(getattr(torch, scale_dtype))
        zero_point = None if symmetric else random_codes(6, groups, bits)
        expected = QuantizedTensor(codes, scale, zero_point, Scheme(bits)).dequantize().to(dtype)
        packed = packed_by_torch(codes, bits, layout)
        assert same_bytes(
            packing.dequantize(packed, scale, zero_point, bits, columns, dtype, layout), expected
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantizing_with_any_scale(dtype: torch.dtype) -> None:
    """Infinities, NaN, subnormals, and ties of the rounding."""
    patterns = torch.randint(-(2**31), 2**31, (4096, 1)).to(torch.int32)
    patterns[:8, 0] = torch.tensor(
        [0x7F800000, 0x7FC00000, 1, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x477FF000, 0]
    )
    scale = patterns.view(torch.float32)
    codes = random_codes(4096, 8, 8)
    expected = QuantizedTensor(codes, scale, None, Scheme(8)).dequantize().to(dtype)
    found = packing.dequantize(codes, scale, None, 8, 8, dtype, Layout.CODES)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert same_bytes(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [512, 300])
def test_errors(columns: int, dtype: torch.dtype, symmetric: bool) -> None:
    weight = random_weight("heavy-tail", 64, columns).to(dtype)
    quantized = QUANTIZERS["rtn"](weight, Scheme(4, None, symmetric))
    expected = _squared_sums(weight, quantized)
    assert cuda.squared_sums(weight, quantized) == pytest.approx(expected, rel=1e-12)
