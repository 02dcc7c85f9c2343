"""rtn against a reference written here, thudm against golden bytes, and what all methods have in common."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_formats import MATRICES, QUICK, golden_matrices, golden_row_names, random_weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glmquant import recipe
from glmquant.errors import QuantizationError, UsageError
from glmquant.packing import pack_nibbles_high_first
from glmquant.quantizers import QUANTIZERS, LeastSquares, RoundToNearest, Thudm, get
from glmquant.scheme import QuantizedTensor, Scheme

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROUPS = {"g32": 32, "g64": 64, "g128": 128, "row": None}
SIDES = {"symmetric": True, "asymmetric": False}
METHODS = {"rtn": RoundToNearest(), "mse": LeastSquares()}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a conversion: on blocks as small as these, threads of torch only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stress_weight(dtype: torch.dtype, columns: int = 256) -> Tensor:
    """Rows of every awkward kind; every group of 32 columns and more has the kind of its row."""
    tiny = torch.finfo(dtype).tiny
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(12, columns, generator=generator)
    rows = [
        torch.zeros(columns),
        noise[0] * 0.02,
        noise[1].abs() * 0.02,  # positive only
        -noise[2].abs() * 0.02 - 0.01,  # negative only
        torch.where(torch.arange(columns) % 32 == 5, 1000.0, noise[3] * 0.01),  # an outlier in each group
        torch.where(torch.arange(columns) % 32 == 9, -1000.0, noise[4] * 0.01),
        noise[5] * tiny,  # normal and subnormal
        noise[6] * tiny / 64,  # subnormal: scales underflow in their dtype
        torch.full((columns,), 0.37),
        torch.full((columns,), -0.37),
        torch.arange(columns) % 16 - 8.0,  # integers: many ties
        torch.where(torch.arange(columns) % 32 == 0, noise[7], 0.0),  # one weight in each group
        torch.where(torch.arange(columns) % 64 < 32, noise[8], 0.0),  # every other group is zero
    ]
    return torch.stack(rows).to(dtype)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that a scale dtype can hold, rounded half to even."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def reference_rtn(weight: Tensor, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points by the definition of rtn, in float32 numpy."""
    rows, columns = weight.shape
    levels = 2**scheme.bits
    low, high = -levels // 2, levels // 2 - 1
    x = weight.float().numpy().reshape(rows, -1, scheme.group_size or columns)
    if scheme.symmetric:
        scale = round_to(np.abs(x).max(-1) / np.float32(high), scheme.scale_dtype)
        zero = np.zeros_like(scale)
    else:
        bottom, top = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        scale = round_to((top - bottom) / np.float32(levels - 1), scheme.scale_dtype)
        steps = np.divide(bottom, scale, out=np.zeros_like(scale), where=scale != 0)
        zero = np.clip(np.rint(np.float32(low) - steps), low, high)
    steps = np.divide(x, scale[..., None], out=np.zeros_like(x), where=scale[..., None] != 0)
    codes = np.clip(np.rint(steps) + zero[..., None], low, high)
    return codes.reshape(rows, columns), scale, zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_is_the_reference(bits: int, group: str, side: str, dtype: str) -> None:
    weight = torch.cat([stress_weight(DTYPES[dtype]), random_weight("laplace", 40, 256, DTYPES[dtype])])
    for scale_dtype in ("float16", "bfloat16", "float32"):
        scheme = Scheme(bits, GROUPS[group], SIDES[side], scale_dtype)  # type: ignore[arg-type]
        found = RoundToNearest()(weight, scheme)
        codes, scale, zero = reference_rtn(weight, scheme)
        assert np.array_equal(found.scale.float().numpy(), scale)
        if found.zero_point is not None:
            assert np.array_equal(found.zero_point.numpy(), zero)
        assert np.array_equal(found.codes.numpy(), codes)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_error_is_half_a_step_where_nothing_is_clipped(bits: int, group: str, side: str) -> None:
    scheme = Scheme(bits, GROUPS[group], SIDES[side])
    weight = torch.cat([stress_weight(torch.float16), random_weight("gaussian", 40, 256)])
    found = RoundToNearest()(weight, scheme)
    width = scheme.group_size or weight.shape[1]
    step = found.scale.float().repeat_interleave(width, 1)
    error = (found.dequantize() - weight.float()).abs()
    inside = (found.codes > scheme.qmin) & (found.codes < scheme.qmax) & (step > 0)
    assert int(inside.sum()) > weight.numel() // 3
    assert bool((error <= step / 2 * (1 + 1e-6))[inside].all())
    # The ends are clipped by no more than rounding the scale (and the zero point) moved the grid.
    moved = (step * torch.finfo(torch.float16).eps / 2 + 2.0**-25) * (1 << bits)
    clipped = ~inside & (step > 0)
    assert bool(
        (error <= step / 2 * (1 + 1e-6) + moved + (0 if scheme.symmetric else step / 2))[clipped].all()
    )


def sample(method: str, rows: int, columns: int) -> tuple[Tensor, Scheme]:
    """A weight, and a scheme with several groups where the method has groups."""
    weight = random_weight("outlier-columns", rows, columns)
    return weight, Scheme(4, None if method == "thudm" else 32)


def assert_same(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert (first.zero_point is None) == (second.zero_point is None)
    if first.zero_point is not None and second.zero_point is not None:
        assert torch.equal(first.zero_point, second.zero_point)


@pytest.mark.parametrize("method", QUANTIZERS)
@QUICK
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), symmetric=st.booleans())
def test_any_row_blocks_give_the_same(method: str, cuts: list[int], symmetric: bool) -> None:
    weight, scheme = sample(method, 40, 96)
    if not symmetric and method != "thudm":
        scheme = Scheme(4, 32, symmetric=False)
    whole = QUANTIZERS[method](weight, scheme)
    edges = [0, *sorted(cuts), 40]
    for start, stop in pairwise(edges):
        assert_same(QUANTIZERS[method](weight[start:stop], scheme), whole.rows(start, stop))


@pytest.mark.parametrize("method", QUANTIZERS)
def test_the_weight_is_left_as_it_was(method: str) -> None:
    for dtype in DTYPES.values():
        weight, scheme = sample(method, 8, 64)
        weight = weight.to(dtype)
        before = weight.clone()
        QUANTIZERS[method](weight, scheme)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("group", ["g32", "row"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_awkward_groups_are_sound(method: str, bits: int, group: str, side: str) -> None:
    """Codes on the grid, finite scales, nothing further off than a step of a full-range grid; zeros stay zeros."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = stress_weight(dtype)
        scheme = Scheme(bits, GROUPS[group], SIDES[side], "float16")
        found = METHODS[method](weight, scheme)
        assert found.codes.dtype == torch.int8
        assert int(found.codes.min()) >= scheme.qmin
        assert int(found.codes.max()) <= scheme.qmax
        assert bool(torch.isfinite(found.scale).all())
        weights = found.dequantize()
        grouped = weight.float().view(len(weight), found.scale.shape[1], -1)
        zero_group = (grouped == 0).all(-1)
        assert bool((weights.view_as(grouped)[zero_group] == 0).all())
        error = (weights.view_as(grouped) - grouped).square().sum(-1).sqrt()
        size = grouped.square().sum(-1).sqrt()
        assert bool((error <= size * (1 + 1e-3)).all()), "quantizing must not be worse than dropping a group"
        normal = grouped.abs().amax(-1) > 1e-3
        assert bool((error <= 0.6 * size)[normal].all())


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "said"),
    [("nan", "it holds NaN"), ("inf", "an infinite value"), ("-inf", "an infinite value")],
)
def test_nan_and_infinity_are_refused(method: str, dtype: str, value: str, said: str) -> None:
    for row, column in ((0, 0), (7, 95), (3, 40)):
        weight, scheme = sample(method, 8, 96)
        weight = weight.to(DTYPES[dtype])
        weight[row, column] = float(value)
        for symmetric in (True, False) if method != "thudm" else (True,):
            with pytest.raises(QuantizationError, match=said):
                QUANTIZERS[method](weight, Scheme(4, scheme.group_size, symmetric))


# bitsandbytes' own works on weights in half, where 3e6 is infinite already; it says that.
@pytest.mark.parametrize("method", [name for name in QUANTIZERS if name != "bitsandbytes"])
def test_a_scale_beyond_half_is_refused(method: str) -> None:
    """bfloat16 sources reach further than half does."""
    weight, scheme = sample(method, 8, 96)
    weight = weight.to(torch.bfloat16)
    weight[2, 3] = 3e6
    with pytest.raises(QuantizationError, match=r"does not fit in float16|beyond the range of half"):
        QUANTIZERS[method](weight, scheme)


def test_the_dictionary_is_whole() -> None:
    assert set(QUANTIZERS) == set(recipe.METHODS) | {"bitsandbytes"}
    for name, quantizer in QUANTIZERS.items():
        assert get(name) is quantizer
    for name in ("rtn", "mse", "thudm"):
        weight, scheme = sample(name, 4, 64)
        assert get(name)(weight, scheme).codes.shape == weight.shape
    with pytest.raises(UsageError, match="'gtpq' is not known; use rtn, mse, thudm"):
        get("gtpq")


# --- THUDM's golden data ----------------------------------------------------------------------------------

# Rows in which the reference wraps around: there our codes are clamped.
WRAPPED = {("edge_rows", 8): ["subnormals_1e-5"], ("edge_rows", 4): ["subnormals_scale_rounds_badly"]}


def stored(tensor: QuantizedTensor) -> Tensor:
    return tensor.codes if tensor.scheme.bits == 8 else pack_nibbles_high_first(tensor.codes)


def row_names(matrix: str) -> list[str]:
    return golden_row_names().get(matrix) or [
        str(n) for n in range(len(golden_matrices()[matrix + ".weight"]))
    ]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", MATRICES)
def test_thudm_is_golden_but_for_wrapped_rows(matrix: str, bits: int) -> None:
    golden = golden_matrices()
    found = Thudm()(golden[f"{matrix}.weight"], Scheme(bits))
    expected = golden[f"{matrix}.int{bits}.weight"]
    assert torch.equal(found.scale.squeeze(1), golden[f"{matrix}.int{bits}.weight_scale"])
    names = row_names(matrix)
    differ = [
        name
        for name, ours, theirs in zip(names, stored(found), expected, strict=True)
        if not torch.equal(ours, theirs)
    ]
    assert differ == WRAPPED.get((matrix, bits), [])
    same = torch.tensor([name not in differ for name in names])
    weights = found.dequantize()
    assert torch.equal(weights[same], golden[f"{matrix}.int{bits}.dequant_fp32"][same])
    assert torch.equal(weights.half()[same], golden[f"{matrix}.int{bits}.dequant_fp16"][same])
    for row in torch.nonzero(~same).flatten().tolist():
        limit = 1 << (bits - 1)
        theirs = golden[f"{matrix}.int{bits}.dequant_fp32"][row]
        wrapped = weights[row] != theirs
        assert bool((found.codes[row][wrapped].short().abs() >= limit - 1).all()), "only clamped codes differ"
        weight = golden[f"{matrix}.weight"][row].float()
        assert bool((weights[row] * weight >= 0).all()), "clamping keeps signs"
        assert bool((theirs * weight < 0).any()), "wrapping does not"


def test_thudm_writes_zeros_where_the_reference_divides_by_zero() -> None:
    for bits in (4, 8):
        found = Thudm()(golden_matrices()["undefined_rows.weight"], Scheme(bits))
        assert not found.scale.any()
        assert not found.codes.any()


def test_thudm_keeps_the_largest_weight_of_bfloat16_rows() -> None:
    """The reference, run in bfloat16, flips the sign of the largest weight of these golden rows."""
    golden = golden_matrices()
    weight = golden["normal.weight_bf16"]
    theirs = golden["normal.int8.bf16.weight"]
    largest = weight.float().abs().argmax(1, keepdim=True)
    signs = weight.float().gather(1, largest).sign()
    flipped = theirs.float().gather(1, largest).sign() != signs
    assert torch.nonzero(flipped.squeeze(1)).flatten().tolist() == [3, 18, 22, 23]
    ours = Thudm()(weight, Scheme(8))
    assert torch.equal(ours.codes.float().gather(1, largest).sign(), signs)
    error = (ours.dequantize() - weight.float()).abs()
    # Quotients near 127 have steps of 1/16 in half, so they may be off by 1/32 before they are rounded.
    assert bool((error <= ours.scale.float() * (0.5 + 1 / 32)).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", MATRICES)
def test_rtn_is_what_thudm_computes_in_float32(matrix: str, bits: int) -> None:
    """Golden as well: the INT4 repositories' CPU loader quantizes in float32, which is what rtn is pinned to."""
    golden = golden_matrices()
    found = RoundToNearest()(golden[f"{matrix}.weight"], Scheme(bits, scale_dtype="float32"))
    assert torch.equal(found.scale.squeeze(1), golden[f"{matrix}.int{bits}.fp32_scale.weight_scale"])
    assert torch.equal(stored(found), golden[f"{matrix}.int{bits}.fp32_scale.weight"])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_linear_layer_gives_the_golden_output(bits: int) -> None:
    golden = golden_matrices()
    weights = Thudm()(golden["normal.weight"], Scheme(bits)).dequantize()
    output = golden["linear.input"] @ weights.t()
    torch.testing.assert_close(output, golden[f"linear.int{bits}.output_fp32"], rtol=1e-5, atol=1e-5)
