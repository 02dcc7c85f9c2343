"""The Triton kernels in the interpreter: every scheme, dtype and tail against the truth, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers_triton import as_on_a_gpu, fake_gpu, interpreted, needs_interpreter  # noqa: F401
from torch import Tensor

from glmquant import QuantizedTensor, Scheme, ops
from glmquant.models.arranging import arrange
from glmquant.models.quantized import QuantizedLinear
from glmquant.ops import Layout, Weight, interleaved
from glmquant.ops import triton as on_gpu
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The interpreter truncates where a GPU rounds to bfloat16: a whole unit, 2**-7, instead of half of one.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 9e-3}


def quantized(rows: int, columns: int, scheme: Scheme) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1 + 0.02
    return RoundToNearest()(weight, scheme)


def weight_of(tensor: QuantizedTensor) -> Weight:
    return Weight(pack_int32(tensor.codes, tensor.scheme.bits), tensor.scale, tensor.zero_point)


def interleave(tensor: QuantizedTensor) -> Weight:
    return ops.arranged(weight_of(tensor), Layout.INTERLEAVED, tensor.scheme.bits, tensor.codes.shape[1])


def activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_product(found: Tensor, x: Tensor, tensor: QuantizedTensor, bias: Tensor | None = None) -> None:
    """`found` is the product with unrounded weights, but for its own rounding."""
    exact = x.double() @ tensor.dequantize().double().t()
    if bias is not None:
        exact += bias.double()
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    torch.testing.assert_close(
        found.double(), exact, rtol=TOLERANCE[x.dtype], atol=1e-3 * float(exact.abs().max())
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 96, 320, 13, 4])
def test_interleaving_is_a_permutation_of_bits(columns: int, bits: int) -> None:
    tensor = quantized(34, columns, Scheme(bits, None, symmetric=False))
    weight, found = weight_of(tensor), interleave(tensor)
    assert found.layout is Layout.INTERLEAVED
    assert found.packed.shape == (34, -(-columns // 64), 2 * bits)
    back = ops.arranged(found, Layout.FILE, bits, columns)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale, weight.scale)
    assert back.zero_point is not None
    assert weight.zero_point is not None
    assert torch.equal(back.zero_point, weight.zero_point)
    operands = found.packed, found.scale, found.zero_point
    assert torch.equal(ops.dequantize(*operands, bits, columns, torch.float32), tensor.dequantize())


def test_the_layout_is_the_one_that_is_drawn() -> None:
    """Column c of a row holds c mod 16 (4 bits) or c (8 bits)."""
    columns = torch.arange(64)
    codes = (columns % 16 - 8).to(torch.int8)[None]
    words = interleaved.interleave(Weight(pack_int32(codes, 4), torch.ones(1, 1), None), 4, 64).packed[0, 0]
    for t, word in enumerate(words.tolist()):
        for r in range(4):
            column = 16 * r + 2 * t
            assert (word >> 4 * r & 15, word >> 16 + 4 * r & 15) == (column % 16, column % 16 + 1)
    bytes_ = columns.to(torch.int8)[None]
    words = interleaved.interleave(Weight(pack_int32(bytes_, 8), torch.ones(1, 1), None), 8, 64).packed[0, 0]
    for t, word in enumerate(words.tolist()):
        for r in range(2):
            assert (word >> 8 * r & 255, word >> 16 + 8 * r & 255) == (32 * r + 2 * t, 32 * r + 2 * t + 1)


@needs_interpreter
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    """One, three and sixteen rows; 1280 columns are more than one step, and not a multiple of one."""
    scale_dtype = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    tensor = quantized(66, 1280, Scheme(bits, group, symmetric, scale_dtype))  # type: ignore[arg-type]
    weight = interleave(tensor)
    for rows in (1, 3, 16):
        x = activations(rows, 1280, dtype)
        assert_product(
            on_gpu.linear(x, weight.packed, weight.scale, weight.zero_point, None, bits), x, tensor
        )


@needs_interpreter
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("rows", "columns", "group"), [
    (2, 64, 64), (32, 64, 32), (34, 96, 32), (30, 200, None), (64, 128, 128), (2, 8, None), (62, 1024, 128),
    (32, 1088, 64),
])  # fmt: skip
@pytest.mark.parametrize("scale_dtype", list(DTYPES))
def test_tails_of_every_kind(rows: int, columns: int, group: int | None, scale_dtype: str) -> None:
    for bits, dtype in ((4, torch.float16), (8, torch.bfloat16)):
        tensor = quantized(rows, columns, Scheme(bits, group, False, scale_dtype))  # type: ignore[arg-type]
        weight, bias = interleave(tensor), activations(1, rows, dtype)[0]
        x = activations(5, columns, dtype)
        found = on_gpu.linear(x, weight.packed, weight.scale, weight.zero_point, bias, bits)
        assert_product(found, x, tensor, bias)


@needs_interpreter
@pytest.mark.usefixtures("as_on_a_gpu")
def test_operands_as_they_come() -> None:
    """No rows, strided and misaligned activations, batches, and more rows than the kernel is for."""
    tensor = quantized(64, 256, Scheme(4, 128))
    weight = interleave(tensor)
    operands = (weight.packed, weight.scale, weight.zero_point, None, 4)
    assert ops.linear(torch.empty(0, 256, dtype=torch.float16), *operands).shape == (0, 64)
    wide = activations(6, 512, torch.float16)
    assert_product(ops.linear(wide[::2, ::2], *operands), wide[::2, ::2], tensor)
    shifted = activations(1, 259, torch.float16).flatten()[3:].view(1, 256)
    assert_product(ops.linear(shifted, *operands), shifted, tensor)
    batch = activations(6, 256, torch.float16).view(2, 3, 256)
    assert torch.equal(ops.linear(batch, *operands).view(6, 64), ops.linear(batch.view(6, 256), *operands))
    many = activations(40, 256, torch.float16)
    few = torch.cat([ops.linear(part, *operands) for part in many.split(8)])
    torch.testing.assert_close(ops.linear(many, *operands), few, rtol=2e-3, atol=2e-3)


@needs_interpreter
@pytest.mark.usefixtures("interpreted")
def test_scales_that_are_no_numbers_show_in_their_row_alone() -> None:
    tensor = quantized(32, 128, Scheme(4, 64))
    tensor.scale[3, 1], tensor.scale[5, 0] = float("inf"), float("nan")
    weight, x = interleave(tensor), activations(2, 128, torch.float16)
    found = on_gpu.linear(x, weight.packed, weight.scale, None, None, 4)
    assert not found[:, [3, 5]].isfinite().any()
    assert found[:, [row for row in range(32) if row not in (3, 5)]].isfinite().all()


@needs_interpreter
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_weights_are_the_same_bits(bits: int, group: int | None, dtype: torch.dtype) -> None:
    """Whole, and some of the rows, in every dtype but bfloat16, which the interpreter does not round to."""
    for symmetric in (True, False):
        tensor = quantized(50, 384, Scheme(bits, group, symmetric, "float32"))
        whole = interleave(tensor)
        for weight, expected in ((whole, tensor), (whole.rows(8, 42), tensor.rows(8, 42))):
            operands = (weight.packed, weight.scale, weight.zero_point, bits, 384, dtype)
            found, wanted = on_gpu.dequantize(*operands), expected.dequantize().to(dtype)
            if dtype == torch.bfloat16:
                torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
            else:
                assert torch.equal(found, wanted)


@needs_interpreter
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_keeps_torchs_rules(bits: int) -> None:
    op = getattr(torch.ops.glmquant, f"linear_w{bits}").default
    for symmetric in (True, False):
        weight = interleave(quantized(32, 64, Scheme(bits, 32, symmetric)))
        for rows in (2, 20):
            x = activations(rows, 64, torch.float16)
            torch.library.opcheck(op, (x, weight.packed, weight.scale, weight.zero_point, None))


@needs_interpreter
@pytest.mark.usefixtures("as_on_a_gpu")
def test_layers_are_arranged_for_a_gpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = quantized(32, 128, Scheme(4, 64, symmetric=False))
    layer, shared = QuantizedLinear.from_quantized(tensor), QuantizedLinear.from_quantized(tensor)
    model = torch.nn.ModuleList([layer, shared, torch.nn.ModuleList([shared])])
    twin = QuantizedLinear.from_quantized(tensor)
    twin.weight_packed = shared.weight_packed
    model.append(twin)
    x = activations(3, 128, torch.float16)
    before, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    arrange(model)
    assert layer.weight_packed.dim() == 3
    assert shared.weight_packed.dim() == 2  # it is another layer's too, which may read it otherwise
    torch.testing.assert_close(layer(x), before, rtol=2e-3, atol=2e-3)
    assert torch.equal(layer.dequantize(), tensor.dequantize())
    monkeypatch.setattr(on_gpu, "why_not", lambda device: "the weights are on cpu")
    arrange(model)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())


def test_weights_that_cannot_be_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "why_not", lambda device: None)
    there = torch.device("cuda")
    assert "odd" in str(ops.layout_objection(there, 33, 1, 64))
    assert "16 columns" in str(ops.layout_objection(there, 32, 4, 64))
    assert ops.layout_objection(there, 32, 1, 100) is None
    assert [ops.layout_objection(there, 32, 384 // group, 384) for group in (32, 64, 128)] == [None] * 3


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 7.5" in str(on_gpu.why_not(fake_gpu(monkeypatch, (7, 5))))


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMQUANT_TRITON", "0")
    assert "GLMQUANT_TRITON=0" in str(on_gpu.why_not(fake_gpu(monkeypatch)))


@pytest.mark.parametrize("error", [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    PermissionError(13, "Permission denied", "/root/.triton/cache"),
])  # fmt: skip
def test_whatever_keeps_triton_from_working_is_said_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    device, tried = fake_gpu(monkeypatch), []

    def fails(device: torch.device) -> None:
        tried.append(device)
        raise error

    monkeypatch.setattr(on_gpu, "_probe", fails)
    reasons = {on_gpu.why_not(device) for _ in range(3)}
    assert len(tried) == 1
    assert reasons == {f"Triton cannot compile or run a kernel ({type(error).__name__}: {error})"}


@needs_interpreter
@pytest.mark.usefixtures("interpreted")
def test_the_probe_multiplies() -> None:
    on_gpu._probe(torch.device("cpu"))


def test_the_choice_says_why() -> None:
    weight = interleave(quantized(32, 64, Scheme(4, 32)))
    x = activations(2, 64, torch.float16)
    request = ops.Request.of(x, weight.scale, None, 4, Layout.INTERLEAVED)
    assert (request.group_size, request.layout) == (32, Layout.INTERLEAVED)
    lines = ops.explain(request).splitlines()
    assert all(line.endswith("because the weight is arranged for a GPU") for line in lines[:2])
    assert "GLMQUANT_HUMMING=1" in lines[2]
    assert lines[3].endswith("because the activations are on cpu")
    from dataclasses import replace

    there = replace(request, device="cuda")
    assert "float32" in str(on_gpu.objection(replace(there, dtype=torch.float32)))
    assert "17 rows" in str(on_gpu.objection(replace(there, rows=17)))
    assert "not interleaved" in str(on_gpu.objection(replace(there, layout=Layout.FILE)))
