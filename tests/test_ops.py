"""The operators for packed linear layers: exact weights, sound operands, and torch.compile."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_convert import small_source
from torch import Tensor
from torch.nn import functional

import glmquant
from glmquant import QuantizedTensor, Scheme, UsageError, _native, ops
from glmquant.ops import choice, reference
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ON_CPU = [i for i in choice.IMPLEMENTATIONS if i.name not in ("humming-kernels", "Triton kernel")]
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
SHAPES = {"square": (64, 64), "odd-rows": (37, 128), "row-only": (24, 136), "one-row": (1, 32)}


def quantized(rows: int, columns: int, scheme: Scheme) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1 + 0.02
    return RoundToNearest()(weight, scheme)


def operands(tensor: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return pack_int32(tensor.codes, tensor.scheme.bits), tensor.scale, tensor.zero_point


def activations(columns: int, dtype: torch.dtype, *batch: int) -> Tensor:
    return torch.randn(*batch, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_weights_are_those_of_the_quantized_tensor(
    bits: int, symmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    for (rows, columns), group in zip(SHAPES.values(), (32, 64, None, 32), strict=True):
        scheme = Scheme(bits, group, symmetric, NAMES[scale_dtype])  # type: ignore[arg-type]
        tensor = quantized(rows, columns, scheme)
        for dequantize in (ops.dequantize, reference._dequantize):  # compiled, where that can be, and not
            found = dequantize(*operands(tensor), bits, columns, dtype)
            assert torch.equal(found, tensor.dequantize().to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3), (1, 1, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("implementation", ON_CPU, ids=lambda i: i.name)
def test_it_is_a_linear_layer(
    monkeypatch: pytest.MonkeyPatch,
    implementation: choice.Implementation,
    bits: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setitem(reference._TILE, "cpu", 1000)  # several tiles, the last one short
    tensor = quantized(37, 128, Scheme(bits, 32, symmetric=False))
    x, bias = activations(128, dtype, *batch), activations(37, dtype)
    if implementation.name.startswith("compiled") and _native.why_not():
        pytest.skip(str(_native.why_not()))
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", [replace(implementation, objection=lambda request: None)])
    found = ops.linear(x, *operands(tensor), bias, bits)
    assert found.dtype == dtype
    assert found.shape == (*batch, 37)
    # The truth for rounded operands, in double precision.
    weight = tensor.dequantize().to(dtype).double()
    exact = functional.linear(x.double(), weight, bias.double())
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    if implementation.name.endswith(
        "8-bit activations"
    ):  # tests/test_cpu_kernels.py holds it to its own bound
        tolerance = 0.05
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_one_row_and_many_agree() -> None:
    tensor = quantized(64, 128, Scheme(4, 64))
    x = activations(128, torch.float16, 9)
    together = ops.linear(x, *operands(tensor), None, 4)
    alone = torch.cat([ops.linear(row, *operands(tensor), None, 4) for row in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)  # nine rows are rounded to 8 bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_operator_keeps_torchs_rules(bits: int, symmetric: bool) -> None:
    tensor = quantized(16, 64, Scheme(bits, 32, symmetric))
    op = getattr(torch.ops.glmquant, f"linear_w{bits}").default
    for dtype in DTYPES:
        torch.library.opcheck(op, (activations(64, dtype, 2, 3), *operands(tensor), None))
    torch.library.opcheck(
        op, (activations(64, torch.float32, 5), *operands(tensor), activations(16, torch.float32))
    )


def test_it_runs_on_the_meta_device() -> None:
    tensor = quantized(16, 64, Scheme(4, 32))
    packed, scale, _ = (None if t is None else t.to("meta") for t in operands(tensor))
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    assert packed is not None
    assert scale is not None
    found = ops.linear(x, packed, scale, None, None, 4)
    assert (found.shape, found.dtype, found.is_meta) == ((2, 3, 16), torch.bfloat16, True)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile for the CPU needs a C++ compiler")
def test_torch_compile_takes_it_whole() -> None:
    tensor = quantized(16, 64, Scheme(4, 32))
    packed, scale, zero_point = operands(tensor)

    def layer(x: Tensor) -> Tensor:
        return functional.silu(ops.linear(x * 2, packed, scale, zero_point, None, 4)) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in ((1, 1), (1, 9), (2, 5)):
        x = activations(64, torch.float32, *batch)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("x", "packed", "scale"),
    [((2, 64), (16, 8), (16, 0)), ((2, 64), (16, 8), (16,)), ((), (16, 8), (16, 2)), ((2, 0), (16, 0), (16, 2)),
     ((2, 64), (8,), (16, 2)), ((2, 64), (), (16, 2))],
    ids=str,
)  # fmt: skip
def test_what_is_no_table_is_refused(
    x: tuple[int, ...], packed: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    """Without groups the kernels would divide by zero."""
    weight = torch.zeros(packed, dtype=torch.int32), torch.ones(scale), None
    with pytest.raises(UsageError, match="are no"):
        ops.linear(torch.zeros(x), *weight, None, 4)
    if x:
        with pytest.raises(UsageError, match="are no"):
            ops.dequantize(*weight, 4, x[-1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_bias_is_of_a_dtype_that_kernels_know(dtype: torch.dtype) -> None:
    packed, scale, _ = operands(quantized(16, 64, Scheme(4, 32)))
    with pytest.raises(UsageError, match="bias"):
        ops.linear(activations(64, torch.float32, 2), packed, scale, None, torch.zeros(16, dtype=dtype), 4)


def test_dequantize_checks_its_operands() -> None:
    packed, scale, _ = operands(quantized(16, 64, Scheme(4, 32)))
    assert ops.dequantize(packed[:0], scale[:0], None, 4, 64, torch.float32).shape == (0, 64)  # of no ids
    for columns, table in ((72, scale), (64, scale[:8]), (64, scale.double())):
        with pytest.raises(UsageError, match="do not fit"):
            ops.dequantize(packed, table, None, 4, columns, torch.float32)


def test_operands_that_do_not_go_together_are_refused() -> None:
    packed, scale, _ = operands(quantized(16, 64, Scheme(4, 32)))
    x = activations(64, torch.float32, 2)
    with pytest.raises(UsageError, match="width 72"):
        ops.linear(activations(72, torch.float32, 2), packed, scale, None, None, 4)
    with pytest.raises(UsageError, match="8-bit"):
        ops.linear(x, packed, scale, None, None, 8)
    with pytest.raises(UsageError, match="scales"):
        ops.linear(x, packed, scale[:8], None, None, 4)
    with pytest.raises(UsageError, match="zero points"):
        ops.linear(x, packed, scale, scale, None, 4)
    with pytest.raises(UsageError, match="bias"):
        ops.linear(x, packed, scale, None, torch.zeros(1), 4)
    with pytest.raises(UsageError, match="float64"):
        ops.linear(x.double(), packed, scale, None, None, 4)
    with pytest.raises(UsageError, match="activations on cpu do not go with a quantized layer on meta"):
        ops.linear(x, packed.to("meta"), scale.to("meta"), None, None, 4)


@pytest.mark.parametrize("implementation", ON_CPU, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_operands_as_they_come(implementation: choice.Implementation, dtype: torch.dtype) -> None:
    """Not contiguous, not aligned, and biases and scales of another dtype: the result is that of tidy ones.

    To the bit where the arithmetic is ours; torch's products are not the same at every address.
    """

    def untidy(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    packed, scale, zero_point = operands(quantized(37, 128, Scheme(4, 32, False)))
    assert zero_point is not None
    for rows in (1, 9):
        x, bias = activations(128, dtype, rows), torch.arange(37).bfloat16()
        expected = implementation.run(x, packed, scale, zero_point, bias, 4)
        for change in (untidy, shifted):
            given = [change(t) for t in (x, packed, scale, zero_point, bias)]
            found = implementation.run(*given, 4)
            exact = {} if "PyTorch" in implementation.name else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("implementation", ON_CPU, ids=lambda i: i.name)
def test_scales_that_are_no_numbers_show_in_their_row_alone(implementation: choice.Implementation) -> None:
    packed, scale, _ = operands(quantized(37, 128, Scheme(4, 32)))
    x = activations(128, torch.float32 if "8-bit" not in implementation.name else torch.float16, 10)
    expected = implementation.run(x, packed, scale, None, None, 4)
    broken = scale.clone()
    broken[3, 1], broken[30, 0] = float("inf"), float("nan")
    found = implementation.run(x, packed, broken, None, None, 4)
    sound = [row for row in range(37) if row not in (3, 30)]
    assert torch.equal(found[:, sound], expected[:, sound])
    assert not bool(found[:, [3, 30]].isfinite().any())


def test_the_readme_asks_which_kernel_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [text for text in re.findall("```python\n(.*?)```", readme, re.S) if "ops.explain" in text]
    glmquant.convert(small_source(tmp_path / "source"), tmp_path / "out", glmquant.Recipe(method="rtn"))
    exec(code, {"glmquant": glmquant, "torch": torch, "model": glmquant.load(tmp_path / "out", "cpu")})
    assert capsys.readouterr().out.endswith(": used\n")


def test_the_choice_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def single(x: Tensor, *rest: object) -> Tensor:
        calls.append(x.shape)
        return reference.linear_tiled(x, *rest)  # type: ignore[arg-type]

    fast = choice.Implementation("fast", lambda r: None if r.rows == 1 else f"it has {r.rows} rows", single)
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", [fast, choice.IMPLEMENTATIONS[-1]])
    tensor = quantized(16, 64, Scheme(4, 32))
    one, five = activations(64, torch.float32, 1), activations(64, torch.float32, 5)
    ops.linear(one, *operands(tensor), None, 4)
    ops.linear(five, *operands(tensor), None, 4)
    assert calls == [(1, 64)]
    request = ops.Request.of(five, tensor.scale, None, 4)
    assert (request.group_size, request.symmetric, request.device) == (32, True, "cpu")
    assert ops.explain(request) == "fast: not used, because it has 5 rows\nPyTorch, tile by tile: used"
    assert ops.explain(ops.Request.of(one, tensor.scale, None, 4)) == "fast: used"


def test_what_the_compiled_kernels_object_to() -> None:
    def asked(rows: int, **changes: object) -> str | None:
        x = torch.empty(rows, 64, dtype=torch.bfloat16)
        request = ops.Request.of(x, torch.empty(16, 2), None, 4)
        return choice.IMPLEMENTATIONS[1].objection(replace(request, **changes))  # type: ignore[arg-type]

    assert asked(1) == _native.why_not()
    assert "1 rows wait" in str(
        choice.IMPLEMENTATIONS[0].objection(ops.Request("cpu", torch.half, 1, 64, 32, 4, True, torch.half))
    )
    assert "cuda" in str(asked(1, device="cuda"))
