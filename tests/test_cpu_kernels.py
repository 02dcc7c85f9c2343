"""The CPU kernels for packed and for 16-bit weights: their stated errors, odd operands, and other instruction sets."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import test_decoding_native as decoding
import torch
from helpers_formats import random_weight
from torch import Tensor
from torch.nn import functional

from glmquant import Scheme, _native, ops
from glmquant.ops import Request, choice, native
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest
from glmquant.scheme import QuantizedTensor

needs_kernels = pytest.mark.skipif(_native.library() is None, reason=f"no kernels: {_native.why_not()}")

SCHEMES = [
    Scheme(4, 128), Scheme(4, 64), Scheme(4, 32, symmetric=False), Scheme(4),
    Scheme(8, 128), Scheme(8, 32, symmetric=False), Scheme(8),
]  # fmt: skip
# Error of an activation over the largest of its 32 neighbours (kernels/cpu/fixed.h).
STEPS = {torch.float16: 2.0**-15, torch.bfloat16: 2.0**-15, torch.float32: 2.0**-22}


def operands(
    rows: int, columns: int, scheme: Scheme
) -> tuple[QuantizedTensor, tuple[Tensor, Tensor, Tensor | None]]:
    tensor = RoundToNearest()(random_weight("gaussian", rows, columns), scheme)
    return tensor, (pack_int32(tensor.codes, scheme.bits), tensor.scale, tensor.zero_point)


def activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, ::37] *= 100  # outliers, as language models have them
    return x.to(dtype)


def bound(x: Tensor, weight: Tensor, step: float) -> Tensor:
    """What errors of activations can come to in each result [rows, out]."""
    columns = x.shape[1]
    padded = functional.pad(x.double().abs(), (0, -columns % 32)).unflatten(1, (-1, 32))
    largest = padded.amax(2, keepdim=True).expand_as(padded).flatten(1)[:, :columns]
    return step * largest @ weight.abs().t()


def assert_within(found: Tensor, x: Tensor, weight: Tensor, step: float) -> None:
    exact = x.double() @ weight.t()
    sums = 2.0**-20 * x.double().abs() @ weight.abs().t()  # float32 additions
    rounding = torch.finfo(found.dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= bound(x, weight, step) + sums + rounding + 1e-7).all()


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 14, 40])
def test_errors_are_as_stated(rows: int, dtype: torch.dtype, scheme: Scheme) -> None:
    for height, columns in ((1, 128), (37, 384), (70, 2176)):
        tensor, packed = operands(height, columns, scheme)
        x, weight = activations(rows, columns, dtype), tensor.dequantize().double()
        assert_within(native.linear(x, *packed, None, scheme.bits), x, weight, STEPS[dtype])
        if dtype != torch.float32:
            assert_within(native.linear_short(x, *packed, None, scheme.bits), x, weight, 1 / 254)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 33, 136, 1000])
def test_any_width_for_scales_of_rows(columns: int, bits: int) -> None:
    tensor, packed = operands(9, columns, Scheme(bits))
    for rows in (1, 20):
        x = activations(rows, columns, torch.float32)
        assert_within(
            native.linear(x, *packed, None, bits), x, tensor.dequantize().double(), STEPS[torch.float32]
        )


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_the_same_bits_whatever_the_threads(rows: int) -> None:
    _, packed = operands(100, 1024, Scheme(4, 64))
    x = activations(rows, 1024, torch.float16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [native.linear(x, *packed, None, 4), native.linear_short(x, *packed, None, 4)]
    finally:
        torch.set_num_threads(before)
    for again in found[2::2]:
        assert torch.equal(again, found[0])
    for again in found[3::2]:
        assert torch.equal(again, found[1])


@needs_kernels
@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(value: float, dtype: torch.dtype) -> None:
    _, packed = operands(40, 256, Scheme(4, 128))
    for rows in (4, 30):
        x = activations(rows, 256, dtype)
        clean = native.linear(x, *packed, None, 4)
        x[1, 77] = value
        found = native.linear(x, *packed, None, 4)
        assert found[1].isnan().all()
        assert torch.equal(found[2:], clean[2:])


@needs_kernels
def test_a_scale_that_is_infinite_stays_in_its_row() -> None:
    _, (packed, scale, _) = operands(40, 256, Scheme(4, 128))
    for rows in (2, 30):
        x = activations(rows, 256, torch.float16)
        clean = native.linear(x, packed, scale, None, None, 4)
        broken = scale.clone()
        broken[3, 1] = torch.inf
        found = native.linear(x, packed, broken, None, None, 4)
        assert not found[:, 3].isfinite().any()
        assert torch.equal(found[:, 4:], clean[:, 4:])


@needs_kernels
def test_operands_that_are_not_contiguous_or_not_aligned() -> None:
    tensor, (packed, scale, zero_point) = operands(24, 256, Scheme(4, 64, symmetric=False))
    assert zero_point is not None
    wide = activations(6, 2 * 256 + 1, torch.float16)
    spread, shifted = wide[:, 1::2], wide.flatten()[1 : 1 + 4 * 256].view(4, 256)
    turned = packed.t().contiguous().t(), scale.t().contiguous().t(), zero_point.t().contiguous().t()
    for x in (spread, shifted):
        wanted = ops.linear(x.clone().contiguous(), packed, scale, zero_point, None, 4)
        assert torch.equal(ops.linear(x, *turned, None, 4), wanted)
    assert ops.linear(wide[:0, :256], packed, scale, zero_point, None, 4).shape == (0, 24)
    assert tensor.codes.shape == (24, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@needs_kernels
def test_a_16_bit_weight(dtype: torch.dtype) -> None:
    for height, columns in ((4, 64), (7, 100), (65, 4096), (6, 3)):
        weight, bias = activations(height, columns, dtype) / 100, activations(1, height, dtype)[0]
        for rows in range(1, 9):
            x = activations(rows, columns, dtype)
            exact = functional.linear(x.double(), weight.double(), bias.double())
            found = ops.linear_16(x.view(1, rows, columns), weight, bias)
            assert found is not None
            assert found.dtype == dtype
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[0].double(), exact, rtol=tolerance, atol=tolerance)
    assert ops.linear_16(activations(9, 64, dtype), activations(8, 64, dtype), None) is None  # many rows
    assert ops.linear_16(activations(1, 64, dtype), activations(8, 64, torch.float32), None) is None
    assert ops.linear_16(activations(1, 64, dtype), activations(3, 64, dtype), None) is None
    x = activations(1, 64, dtype).requires_grad_()
    assert ops.linear_16(x, activations(8, 64, dtype), None) is None  # there is no backward


def name(rows: int, dtype: torch.dtype = torch.float16, group: int = 128) -> str:
    return choice.choose(Request("cpu", dtype, rows, 256, group, 4, True, dtype)).name


@needs_kernels
def test_which_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native._native, "has_amx", lambda: False)
    assert name(1) == name(8) == name(99, torch.float32) == "compiled CPU kernel"
    assert name(9) == name(512, torch.bfloat16) == "compiled CPU kernel, 8-bit activations"
    assert name(1, group=16) == "PyTorch, tile by tile"
    monkeypatch.setenv("GLMQUANT_EXACT", "1")
    assert name(9) == "compiled CPU kernel"
    assert "GLMQUANT_EXACT=1 asks" in choice.explain(
        Request("cpu", torch.float16, 9, 256, 128, 4, True, torch.float16)
    )
    monkeypatch.setattr(native._native, "has_amx", lambda: True)
    assert name(100, torch.bfloat16) == "PyTorch, tile by tile"
    assert name(16, torch.bfloat16) == name(100) == "compiled CPU kernel"


def can_run(march: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    needed = {"x86-64": "sse2", "x86-64-v3": "avx2", "skylake-avx512": "avx512bw", "knl": "avx512er"}
    return needed[march] in flags


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "skylake-avx512"])
def test_processors_with_fewer_instructions(
    march: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same sources without AVX-512, and with it but without its instructions for bytes."""
    if not can_run(march):
        pytest.skip(f"this processor is no {march}")
    monkeypatch.delenv("GLMQUANT_NATIVE", raising=False)
    monkeypatch.setenv("GLMQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(_native, "_TUNINGS", ((f"-march={march}", "-O1", "-fopenmp"),))
    found = _native._find()
    assert found.library is not None, found.reason
    monkeypatch.setattr(_native, "_loaded", found)
    for scheme in SCHEMES:
        tensor, packed = operands(37, 384, scheme)
        weight = tensor.dequantize().double()
        for rows in (1, 4, 7, 9, 23):
            for dtype, step in STEPS.items():
                x = activations(rows, 384, dtype)
                assert_within(native.linear(x, *packed, None, scheme.bits), x, weight, step)
            short = native.linear_short(x.half(), *packed, None, scheme.bits)
            assert_within(short, x.half(), weight, 1 / 254)
    test_a_16_bit_weight(torch.float16)
    test_a_16_bit_weight(torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        decoding.test_norm(257, dtype)
        decoding.test_silu(3, 37, dtype)
        decoding.test_positions(3, 1, 16, 16, dtype)
        decoding.test_attention(255, dtype)
