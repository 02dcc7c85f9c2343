"""Schemes and what their codes stand for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers_formats import QUICK
from hypothesis import given
from hypothesis import strategies as st

from glmquant.errors import QuantizationError, UsageError
from glmquant.recipe import Recipe, parse_size
from glmquant.scheme import GROUP_SIZES, QuantizedTensor, Scheme

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"bits": 3}, "3 bits are not supported; use 4 or 8", id="3-bits"),
        pytest.param({"bits": 16}, "16 bits are not supported; use 4 or 8", id="16-bits"),
        pytest.param(
            {"bits": 4, "group_size": 48},
            "group size 48 is not supported; use 32, 64, 128 or 'row'",
            id="g48",
        ),
        pytest.param({"bits": 4, "group_size": 0}, "group size 0 is not supported", id="g0"),
        pytest.param({"bits": 4, "scale_dtype": "int8"}, "scales cannot be stored as int8", id="int8-scales"),
    ],
)
def test_unknown_schemes_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Scheme(**arguments)


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -128, 127)], ids=["4bit", "8bit"])
def test_code_range(bits: int, low: int, high: int) -> None:
    assert (Scheme(bits).qmin, Scheme(bits).qmax) == (low, high)


@pytest.mark.parametrize(
    ("columns", "group", "works"),
    [
        pytest.param(100, 128, [], id="nothing-but-row"),
        pytest.param(13696 // 2, 128, [32, 64], id="half-of-the-real-mlp"),
        pytest.param(13696 // 4, 64, [32], id="quarter-of-the-real-mlp"),
        pytest.param(96, 64, [32], id="96"),
    ],
)
def test_width_names_the_tensor_and_the_groups_that_work(columns: int, group: int, works: list[int]) -> None:
    with pytest.raises(UsageError) as refused:
        Scheme(4, group).check_width("model.layers.0.mlp.down_proj.weight", columns)
    message = str(refused.value)
    assert f"group size {group} does not divide the {columns} columns" in message
    assert "model.layers.0.mlp.down_proj.weight" in message
    offered = message.split("group sizes that do:")[1].strip(" .").split(", ")
    assert offered == [*map(str, works), "row"]
    for choice in offered:
        Scheme(4, None if choice == "row" else int(choice)).check_width("w", columns)


@QUICK
@given(st.integers(1, 20000), st.sampled_from([None, *GROUP_SIZES]))
def test_width_is_refused_exactly_where_groups_do_not_divide(columns: int, group: int | None) -> None:
    scheme = Scheme(4, group)
    if group is not None and columns % group:
        with pytest.raises(UsageError):
            scheme.check_width("w", columns)
    else:
        scheme.check_width("w", columns)
        assert scheme.groups(columns) * (group or columns) == columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_round_to_the_nearest_stored_number(dtype: str) -> None:
    exact = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    stored = Scheme(4, scale_dtype=dtype).store_scale(exact)  # type: ignore[arg-type]
    assert stored.dtype == DTYPES[dtype]
    ulp = torch.finfo(DTYPES[dtype]).eps * exact.abs()
    assert bool(((stored.float() - exact).abs() <= ulp / 2).all())


@pytest.mark.parametrize(
    ("dtype", "fits", "overflows"),
    [
        pytest.param("float16", 65504.0, 65520.0, id="half"),
        pytest.param("float16", -65504.0, -65520.0, id="half-negative"),
        pytest.param("bfloat16", 3.38e38, 3.4e38, id="bfloat16"),
    ],
)
def test_a_scale_that_overflows_is_refused(dtype: Any, fits: float, overflows: float) -> None:
    scheme = Scheme(4, scale_dtype=dtype)
    assert torch.isfinite(scheme.store_scale(torch.tensor([[1.0, fits]]))).all()
    with pytest.raises(
        QuantizationError, match=rf"{abs(overflows):.4g}.* does not fit in {dtype}".replace("+", r"\+")
    ):
        scheme.store_scale(torch.tensor([[1.0, overflows]]))


def test_schemes_read_well() -> None:
    assert str(Scheme(4, 128)) == "int4 g128"
    assert str(Scheme(8)) == "int8 row"
    assert str(Scheme(4, 32, symmetric=False)) == "int4 g32 asym"
    assert Scheme(4, 32, False, "bfloat16").to_json() == {
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "scale_dtype": "bfloat16",
    }


@st.composite
def quantized(draw: st.DrawFn) -> QuantizedTensor:
    """Any codes, zero points and scales that there can be, subnormal and negative scales included."""
    bits = draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([None, 32, 64]))
    dtype = draw(st.sampled_from(["float16", "bfloat16"]))
    scheme = Scheme(bits, group, draw(st.booleans()), dtype)
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    columns = groups * (group or 10)
    shape = (rows, scheme.groups(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low, high = scheme.qmin, scheme.qmax + 1
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8, generator=generator)
    size = draw(st.floats(-24, 8))
    scale = (torch.randn(shape, generator=generator) * 2.0**size).to(DTYPES[dtype])
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    return QuantizedTensor(codes, scale, zero, scheme)


@QUICK
@given(quantized())
def test_dequantize_is_exact(tensor: QuantizedTensor) -> None:
    """Against float64, element by element, and against the product that runtimes compute in the scale's dtype."""
    width = tensor.codes.shape[1] // tensor.scale.shape[1]
    code = tensor.codes.double()
    if tensor.zero_point is not None:
        code = code - tensor.zero_point.double().repeat_interleave(width, 1)
    scale = tensor.scale.repeat_interleave(width, 1)
    weights = tensor.dequantize()
    assert weights.dtype == torch.float32
    assert torch.equal(weights.double(), code * scale.double())
    assert torch.equal(weights.to(scale.dtype), code.to(scale.dtype) * scale)


@QUICK
@given(quantized(), st.data())
def test_rows_dequantize_alone(tensor: QuantizedTensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tensor.codes.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, tensor.codes.shape[0]))
    assert torch.equal(tensor.rows(start, stop).dequantize(), tensor.dequantize()[start:stop])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("3.5 gib", int(3.5 * 2**30)),
        (" 500MB ", 500 * 10**6),
        ("2kib", 2048),
        (".5MB", 500_000),
        ("1048576", 1 << 20),
        ("12b", 12),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-4GB", "4 4GB", "1e9", "nan", "0", "0.2b", "４GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["6", " 8 ", "0.5", "1000", "1048575"])
def test_a_small_number_wants_a_unit(text: str) -> None:
    """Who writes --vram 6 means 6 GiB, and would be told that nothing fits into 6 bytes."""
    with pytest.raises(
        UsageError, match=rf"{re.escape(repr(text))} would be \d+ bytes; write .*GiB \(or .*GB\)"
    ):
        parse_size(text)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"bits": 5}, "--bits 5 is not supported; use 4, 8 or 16"),
        ({"max_shard_size": 0}, "shard size must be positive"),
        ({"layout": "thudm"}, "layout 'thudm' is not known; use native or original"),
    ],
    ids=["bits", "shards", "layout"],
)
def test_unknown_recipes_are_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Recipe(**choices)
