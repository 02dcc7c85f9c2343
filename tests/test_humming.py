"""humming-kernels as a way to multiply: its layout against its own source, and when it is used. All on a CPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_humming import needs_humming, repack
from helpers_triton import fake_gpu
from torch import Tensor

from glmquant import QuantizedTensor, Scheme, UsageError, ops
from glmquant.models.arranging import arrange
from glmquant.models.quantized import QuantizedLinear
from glmquant.ops import Layout, Weight, choice, humming
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest

KINDS = [(4, True, "float16"), (4, False, "bfloat16"), (8, True, "float16"), (8, True, "bfloat16")]
GPU = torch.device("cuda")


def weight_of(tensor: QuantizedTensor) -> Weight:
    return Weight(pack_int32(tensor.codes, tensor.scheme.bits), tensor.scale, tensor.zero_point)


def some_weight(rows: int, columns: int, groups: int, bits: int, symmetric: bool, scale: str) -> Weight:
    """All codes and zero points, wherever; by arithmetic, so that it is the same everywhere."""
    count = torch.arange(rows * columns, dtype=torch.int64).view(rows, columns) * 2654435761 >> 13
    codes = (count % (1 << bits) - (1 << bits - 1)).to(torch.int8)
    table = torch.arange(rows * groups, dtype=torch.int64).view(rows, groups) * 40503 >> 3
    zero_point = None if symmetric else (table % 16 - 8).to(torch.int8)
    return Weight(pack_int32(codes, bits), (table % 251).to(getattr(torch, scale)), zero_point)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize(("bits", "symmetric", "scale"), KINDS)
def test_back_from_its_layout(
    bits: int, symmetric: bool, scale: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(humming, "_BLOCK", 1 << 16)  # several pieces, the last one short
    weight = some_weight(448, 320, groups, bits, symmetric, scale)
    found = ops.arranged(weight, Layout.HUMMING, bits, 320)
    assert (found.layout, found.groups, found.packed.shape) == (Layout.HUMMING, groups, (20, 7, 32, bits))
    back = ops.arranged(found, Layout.FILE, bits, 320)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale, weight.scale)
    assert back.scale.is_contiguous()
    assert (back.zero_point is None) == symmetric
    assert symmetric or torch.equal(back.zero_point, weight.zero_point)  # type: ignore[arg-type]
    operands = found.packed, found.scale, found.zero_point
    expected = ops.dequantize(weight.packed, weight.scale, weight.zero_point, bits, 320, torch.float32)
    assert torch.equal(ops.dequantize(*operands, bits, 320, torch.float32), expected)


@needs_humming
@pytest.mark.parametrize(("bits", "symmetric", "scale"), KINDS)
def test_codes_lie_as_its_own_kernel_puts_them(bits: int, symmetric: bool, scale: str) -> None:
    weight = some_weight(192, 320, 5, bits, symmetric, scale)
    found = humming.arrange(weight, bits, 320)
    theirs = repack(weight.packed, bits, folded=bits == 8 and scale == "bfloat16")
    assert torch.equal(found.packed.flatten(1), theirs)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, told that it is on an H200."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # nothing is built in the background
    device = pytest.importorskip("humming.utils.device")
    known = {
        "index": 0, "name": "NVIDIA H200", "is_ppu": False, "sm_version": 90, "sm_major": 9, "sm_minor": 0,
        "sm_count": 132, "max_smem_size": 227 << 10, "max_registers_per_sm": 65536, "l2_cache_size": 60 << 20,
    }  # fmt: skip
    from humming.device import DeviceInfo

    monkeypatch.setattr(device, "_extension", SimpleNamespace(_DeviceInfo=lambda i: SimpleNamespace(**known)))
    monkeypatch.setattr(DeviceInfo, "_instances", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    humming.prepared.cache_clear()
    yield
    humming.prepared.cache_clear()


@needs_humming
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("groups", [1, 5])
def test_scales_and_zero_points_lie_as_it_puts_them(groups: int) -> None:
    from humming import dtypes
    from humming.transform import transform_humming_weight_scale, transform_humming_zero_point

    weight = some_weight(192, 320, groups, 4, False, "float16")
    found = humming.arrange(weight, 4, 320)
    theirs = transform_humming_weight_scale(weight.scale, to_apply_on_c=groups == 1)
    assert torch.equal(found.scale, theirs)
    assert weight.zero_point is not None
    theirs = transform_humming_zero_point(weight.zero_point.to(torch.int32) + 8, dtypes.uint4)
    assert found.zero_point is not None
    assert torch.equal(found.zero_point, theirs)


@needs_humming
@pytest.mark.usefixtures("package")
def test_it_takes_what_we_say_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checks of layer and kernel, for the shapes of real models and the smallest; all but the compiler."""
    from humming.jit.compiler import NVRTCCompiler
    from humming.kernel.humming import HummingKernel

    monkeypatch.setattr(NVRTCCompiler, "_get_version", classmethod(lambda cls: (13, 0)))
    monkeypatch.setattr(HummingKernel, "prepare", lambda self: None)
    monkeypatch.setattr(HummingKernel, "register_kernel", lambda self: None)
    for n, k in ((4608, 4096), (27392, 4096), (4096, 13696), (65024, 4096), (128, 64), (384, 320)):
        for bits, symmetric, scale in KINDS:
            for group in (1, k // 64, k // 32):
                for rows in humming._ROWS:
                    dtype = getattr(torch, scale)
                    layer, kernel = humming.prepared(GPU, dtype, n, k, group, bits, symmetric, rows)
                    found = json.loads(layer)
                    assert (found["sm_version"], found["shape_n"], found["shape_k"]) == (90, n, k)
                    assert found["c_dtype"] == found["a_dtype"] == found["bs_dtype"] == scale
                    config = found | json.loads(kernel)
                    config.pop("num_sms", None)
                    made = HummingKernel(**config)
                    others = (
                        "use_raw_weight",
                        "use_flat_weight",
                        "use_packed_k_layout",
                        "use_native_dequant",
                    )
                    assert not any(getattr(made, layout) for layout in others)


DIGESTS = {  # of what that kernel and those functions of version 0.1.19 give
    (4, True, "float16"): "85be295e699285a6",
    (4, False, "bfloat16"): "51b60f7637063bf9",
    (8, True, "float16"): "4f41cfd9916ea97a",
    (8, True, "bfloat16"): "a7d82a2a81a9d184",
}


@pytest.mark.parametrize(("bits", "symmetric", "scale"), KINDS)
def test_the_layout_is_that_of_the_version_it_was_made_for(bits: int, symmetric: bool, scale: str) -> None:
    found = humming.arrange(some_weight(192, 320, 5, bits, symmetric, scale), bits, 320)
    digest = hashlib.sha256()
    for part in (found.packed, found.scale, found.zero_point):
        if part is not None:
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[bits, symmetric, scale]


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """`GLMQUANT_HUMMING=1`, on a GPU that is this CPU; the package's product is a plain one. What it was given."""
    calls = []

    def product(**given: Any) -> Tensor:
        calls.append(given)
        n, k, bits = json.loads(given["layer_config"])
        packed = given["weight"].view(k // 16, n // 64, 32, bits)
        operands = packed, given["weight_scale"], given["zero_point"]
        return given["inputs"] @ ops.dequantize(*operands, bits, k, given["inputs"].dtype).t()

    def prepared(
        device: torch.device, dtype: torch.dtype, n: int, k: int, groups: int, bits: int, symmetric: bool, rows: int
    ) -> tuple[str, str]:  # fmt: skip
        return json.dumps([n, k, bits]), json.dumps({"rows": rows})

    monkeypatch.setenv("GLMQUANT_HUMMING", "1")
    package = ModuleType("humming")
    monkeypatch.setitem(sys.modules, "humming", package)
    monkeypatch.setitem(sys.modules, "humming.ops", SimpleNamespace(humming_gemm=product))
    monkeypatch.setattr(humming, "prepared", prepared)
    monkeypatch.setattr(humming, "why_not", lambda *kind: None)
    theirs = next(i for i in choice.IMPLEMENTATIONS if i.name == "humming-kernels")
    there = replace(theirs, objection=lambda request: humming.objection(replace(request, device="cuda")))
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", [there, choice.IMPLEMENTATIONS[-1]])
    yield calls
    humming._locks.cache_clear()


@pytest.mark.parametrize(("bits", "symmetric", "scale"), KINDS)
def test_layers_get_its_layout_and_lose_it(
    asked_for: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, scale: str
) -> None:
    scheme = Scheme(bits, 64, symmetric, scale)  # type: ignore[arg-type]
    dtype = getattr(torch, scale)
    tensor = RoundToNearest()(torch.randn(128, 192, generator=torch.Generator().manual_seed(0)), scheme)
    layer = QuantizedLinear.from_quantized(tensor, torch.randn(128).to(dtype))
    small = QuantizedLinear.from_quantized(RoundToNearest()(torch.randn(64, 192), scheme))
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(2, 3, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = layer(x)
    arrange(torch.nn.ModuleList([layer, small]))
    assert layer.weight_operands.layout is Layout.HUMMING
    assert small.weight_operands.layout is not Layout.HUMMING
    assert sum(p.nbytes for p in layer.parameters()) <= sum(
        t.nbytes for t in state.values()
    )  # no second copy
    torch.testing.assert_close(layer(x), before, rtol=2e-2, atol=2e-2)
    assert asked_for[-1]["inputs"].shape == (6, 192)
    assert asked_for[-1]["locks"].numel() == 2048
    assert not asked_for[-1]["locks"].any()
    assert torch.equal(layer.dequantize(), tensor.dequantize())
    calls = len(asked_for)
    exact = x.double() @ tensor.dequantize().double().t() + layer.bias.double()  # type: ignore[union-attr]
    other = layer(x.float()).double()  # whose dtype its kernels do not have
    torch.testing.assert_close(other, exact, rtol=1e-4, atol=1e-4)
    assert len(asked_for) == calls
    monkeypatch.delenv("GLMQUANT_HUMMING")
    arrange(layer)
    assert layer.weight_operands.layout is Layout.FILE
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())


def test_operands_as_they_come(asked_for: list[dict[str, Any]]) -> None:
    weight = some_weight(128, 192, 3, 4, True, "float16")
    found = humming.arrange(weight, 4, 192)
    operands = found.packed, found.scale, None, None, 4
    assert ops.linear(torch.empty(0, 192, dtype=torch.float16), *operands).shape == (0, 128)
    assert not asked_for
    wide = torch.randn(6, 400).half()
    for x in (wide[::2, 1:193], wide[:, ::2][:, :192], wide.flatten()[3:195].view(1, 192)):
        ops.linear(x, *operands)
        given = asked_for[-1]["inputs"]
        assert torch.equal(given, x)
        assert given.is_contiguous()
        assert given.data_ptr() % 16 == 0
    for rows, kernel in ((1, 8), (9, 16), (64, 64), (65, 256), (300, 4096), (5000, 4096)):
        ops.linear(torch.zeros(rows, 192).half(), *operands)
        assert json.loads(asked_for[-1]["tuning_config"]) == {"rows": kernel}
    for width in (176, 193, 208):
        with pytest.raises(UsageError, match=f"width {width} do not fit"):
            ops.linear(torch.zeros(1, width).half(), *operands)
    with pytest.raises(UsageError, match="zero points"):
        ops.linear(wide[:, :192], found.packed, found.scale, torch.zeros(3, 128, dtype=torch.int16), None, 4)
    op = torch.ops.glmquant.linear_w4.default
    torch.library.opcheck(op, (wide[:2, :192].contiguous(), found.packed, found.scale, None, None))


def test_it_has_to_be_asked_for_and_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def objection(rows: int, columns: int, groups: int, bits: int = 4, scale: str = "float16") -> str | None:
        weight = some_weight(rows, columns, groups, bits, bits == 8, scale)
        return humming.layout_objection(weight, bits, columns)

    monkeypatch.delenv("GLMQUANT_HUMMING", raising=False)
    assert objection(128, 192, 3) == "GLMQUANT_HUMMING=1 does not ask for it"
    monkeypatch.setenv("GLMQUANT_HUMMING", "1")
    assert objection(128, 192, 3) == "the weights are on cpu"
    monkeypatch.setattr(humming, "why_not", lambda *kind: None)
    assert [objection(128, 192, groups) for groups in (1, 3, 6)] == [None] * 3
    assert objection(64, 192, 3) == "64 rows and 192 columns are no multiples of 128 and 64"
    assert "no multiples" in str(objection(128, 96, 3))
    assert "12 columns" in str(objection(128, 192, 16))
    assert "float32" in str(objection(128, 192, 3, scale="float32"))
    weight = replace(some_weight(128, 192, 3, 8, True, "float16"), zero_point=torch.zeros(128, 3).char())
    assert "8 bits and zero points" in str(humming.layout_objection(weight, 8, 192))


def test_the_choice_says_why() -> None:
    weight = some_weight(128, 192, 3, 4, True, "bfloat16")
    there = replace(ops.Request.of(torch.empty(2, 192), weight.scale, None, 4), device="cuda")
    assert "GLMQUANT_HUMMING=1" in ops.explain(there)
    arranged = replace(there, layout=Layout.HUMMING)
    assert humming.objection(arranged) == "the activations are float32, and the scales bfloat16"
    assert ops.choose(arranged).name == "PyTorch, tile by tile"
    assert ops.choose(replace(arranged, dtype=torch.bfloat16)).name == "humming-kernels"


def test_what_keeps_it_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (4, True, torch.bfloat16)
    fake_gpu(monkeypatch, (7, 5))

    def why_not() -> str:
        humming._try_out.cache_clear()
        return str(humming.why_not(GPU, *kind))

    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: None)
    assert why_not() == "humming-kernels is not installed (pip install humming-kernels)"
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: object())
    assert why_not() == "the GPU Test has compute capability 7.5, and bfloat16 needs 8.0"
    fake_gpu(monkeypatch)
    for error in (
        PermissionError(13, "Permission denied", "/root/.humming"),
        RuntimeError("no NVRTC\nat all"),
    ):

        def fails(*kind: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(humming, "_probe", fails)
        assert why_not().startswith("humming-kernels cannot compile or run a kernel (")
        assert "\n" not in why_not()
    humming._try_out.cache_clear()


@pytest.mark.parametrize(("bits", "symmetric", "scale"), KINDS)
def test_the_probe_finds_a_wrong_result(
    asked_for: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, scale: str
) -> None:
    kind = torch.device("cpu"), bits, symmetric, getattr(torch, scale)
    humming._probe(*kind)
    assert len(asked_for) == 1
    monkeypatch.setattr(humming, "_transposed_blocks", lambda table, grouped: table)  # another version's
    right = sys.modules["humming.ops"].humming_gemm

    def other(**given: Any) -> Tensor:
        return right(**(given | {"weight_scale": given["weight_scale"].flip(1)}))

    monkeypatch.setitem(sys.modules, "humming.ops", SimpleNamespace(humming_gemm=other))
    with pytest.raises(RuntimeError, match="wrong result"):
        humming._probe(*kind)
