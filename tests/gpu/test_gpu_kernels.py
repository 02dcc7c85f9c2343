"""The CUDA kernels where they belong: the bytes of the CPU.

``pytest -m gpu tests/gpu`` needs nothing beside the repository.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers_weights import WEIGHT_KINDS, random_weight
from torch import Tensor

from glmquant import _cuda
from glmquant._cuda import packing
from glmquant._cuda.packing import Layout
from glmquant._quantize import _squared_sums
from glmquant.errors import QuantizationError
from glmquant.packing import pack_int32, pack_nibbles_high_first, unpack_int32, unpack_nibbles_high_first
from glmquant.quantizers import QUANTIZERS, native
from glmquant.scheme import QuantizedTensor, Scheme

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def assert_same(weight: Tensor, scheme: Scheme, method: str) -> None:
    expected, found = QUANTIZERS[method](weight, scheme), QUANTIZERS[method](weight.to(GPU), scheme)
    assert found.codes.is_cuda
    assert same_bytes(found.scale, expected.scale)
    assert torch.equal(found.codes.cpu(), expected.codes)
    if expected.zero_point is not None:
        assert found.zero_point is not None
        assert torch.equal(found.zero_point.cpu(), expected.zero_point)


def test_kernels_can_be_used() -> None:
    assert _cuda.why_not(GPU) is None


@pytest.fixture(params=["kernels", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, or torch's own operations on the GPU, as where cpm_kernels cannot be used."""
    if request.param == "torch":
        monkeypatch.setattr(_cuda, "kernels", lambda device: None)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_same_bytes(method: str, bits: int, group: int | None, dtype: torch.dtype, engine: str) -> None:
    for kind, symmetric, scale_dtype in itertools.product(
        WEIGHT_KINDS, (True, False), ("float16", "bfloat16", "float32")
    ):
        weight = random_weight(kind, 24, 640).to(dtype)
        assert_same(weight, Scheme(bits, group, symmetric, scale_dtype), method)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 64, 255, 257, 4096, 13696])
def test_same_bytes_thudm(columns: int, bits: int, engine: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert_same(random_weight("heavy-tail", 40, columns).to(dtype), Scheme(bits), "thudm")


@pytest.mark.parametrize("method", ["rtn", "mse", "thudm"])
def test_any_pattern(method: str) -> None:
    """Subnormals, zeros, and numbers of any size side by side."""
    for dtype, bits in itertools.product(DTYPES, (4, 8)):
        if method == "thudm" and dtype != torch.float16:
            continue
        whole = torch.int32 if dtype == torch.float32 else torch.int16
        limits = torch.iinfo(whole)
        weight = torch.randint(limits.min, limits.max, (512, 64)).to(whole).view(dtype)
        # a few powers of two below the largest, so that sums of squares and scales stay finite
        weight = torch.where(torch.isfinite(weight) & (weight.abs() < 1e4), weight, 0)
        weight[::7] *= 2.0**-12
        scale_dtype = "float16" if method == "thudm" else "float32"
        assert_same(weight, Scheme(bits, None, scale_dtype=scale_dtype), method)


def test_a_whole_embedding() -> None:
    assert_same(random_weight("gaussian", 65024, 1024), Scheme(8, 128), "mse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_half_scale(dtype: torch.dtype) -> None:
    """The conversions of the hardware are those of torch on a CPU."""
    scale = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(-1, 1)
    codes = torch.randint(-128, 128, (1 << 16, 8), dtype=torch.int8)
    expected = QuantizedTensor(codes, scale, None, Scheme(8)).dequantize().to(dtype)
    found = packing.dequantize(codes.to(GPU), scale.to(GPU), None, 8, 8, dtype, Layout.CODES)
    assert found is not None
    assert torch.equal(found.cpu().isnan(), expected.isnan())
    assert same_bytes(found.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("columns", [1, 6, 8, 30, 31, 4096])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits: int, columns: int, engine: str) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (9, columns), dtype=torch.int8)
    words = pack_int32(codes.to(GPU), bits)
    assert same_bytes(words, pack_int32(codes, bits))
    assert torch.equal(unpack_int32(words, bits, columns).cpu(), codes)
    if bits == 4 and columns % 2 == 0:
        nibbles = pack_nibbles_high_first(codes.to(GPU))
        assert same_bytes(nibbles, pack_nibbles_high_first(codes))
        assert torch.equal(unpack_nibbles_high_first(nibbles).cpu(), codes)


def test_misaligned_and_strided_weights() -> None:
    flat = random_weight("gaussian", 1, 8 * 64 + 3).flatten()
    for start in range(4):
        weight = flat[start : start + 8 * 63].view(8, 63)
        expected = QUANTIZERS["mse"](weight, Scheme(4))
        found = QUANTIZERS["mse"](flat.to(GPU)[start : start + 8 * 63].view(8, 63), Scheme(4))
        assert torch.equal(found.codes.cpu(), expected.codes)
    strided = random_weight("gaussian", 8, 256)[:, ::2]
    found = QUANTIZERS["rtn"](strided.to(GPU).contiguous(), Scheme(4))
    assert torch.equal(found.codes.cpu(), QUANTIZERS["rtn"](strided.contiguous(), Scheme(4)).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value: float) -> None:
    weight = random_weight("gaussian", 8, 128).to(GPU)
    weight[3, 5] = value
    with pytest.raises(QuantizationError, match="NaN" if value != value else "infinite"):
        QUANTIZERS["mse"](weight, Scheme(4))


def test_scale_that_overflows() -> None:
    with pytest.raises(QuantizationError, match="does not fit in float16"):
        QUANTIZERS["rtn"](torch.full((2, 64), 1e6, dtype=torch.bfloat16, device=GPU), Scheme(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors(dtype: torch.dtype) -> None:
    weight = random_weight("heavy-tail", 64, 512).to(dtype)
    quantized = QUANTIZERS["rtn"](weight, Scheme(4, 32, symmetric=False))
    moved = QUANTIZERS["rtn"](weight.to(GPU), Scheme(4, 32, symmetric=False))
    found = native.squared_sums(weight.to(GPU), moved)
    assert found == pytest.approx(_squared_sums(weight, quantized), rel=1e-12)


def test_launched_on_the_current_stream() -> None:
    """Work that is queued on a stream is done before the kernels read its result."""
    weight = random_weight("gaussian", 4096, 1024)
    stream = torch.cuda.Stream()
    large = torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros(4096, 1024, dtype=torch.float16, device=GPU)
        for _ in range(20):
            large = large @ large * 1e-3
        late.copy_(weight)
        found = QUANTIZERS["rtn"](late, Scheme(4, 32))
    stream.synchronize()
    assert torch.equal(found.codes.cpu(), QUANTIZERS["rtn"](weight, Scheme(4, 32)).codes)


def test_in_a_cuda_graph() -> None:
    codes = torch.randint(-8, 8, (64, 128), dtype=torch.int8)
    packed = pack_int32(codes, 4).to(GPU)
    scale = torch.rand(64, 1, dtype=torch.float16, device=GPU)
    packing.dequantize(packed, scale, None, 4, 128, torch.float16)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packing.dequantize(packed, scale, None, 4, 128, torch.float16)
    scale.fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert out is not None
    assert torch.equal(out.cpu(), codes.half() * 2)
