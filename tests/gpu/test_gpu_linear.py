"""Products with packed weights, and the decode loop, where they belong."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import GlmConfig

from glmquant import Scheme, UsageError, ops
from glmquant.models import decoding
from glmquant.models.glm import GlmForCausalLM
from glmquant.models.quantized import QuantizedLinear
from glmquant.ops import choice, humming
from glmquant.ops import triton as on_gpu
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest
from glmquant.scheme import QuantizedTensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def quantized(rows: int, columns: int, scheme: Scheme) -> QuantizedTensor:
    return RoundToNearest()(torch.randn(rows, columns) * 0.1 + 0.01, scheme)


def interleaved(tensor: QuantizedTensor) -> ops.Weight:
    bits = tensor.scheme.bits
    zero = None if tensor.zero_point is None else tensor.zero_point.to(GPU)
    weight = ops.Weight(pack_int32(tensor.codes, bits).to(GPU), tensor.scale.to(GPU), zero)
    return ops.arranged(weight, ops.Layout.INTERLEAVED, bits, tensor.codes.shape[1])


def test_triton_can_be_used() -> None:
    assert on_gpu.why_not(GPU) is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_products(bits: int, group: int | None, dtype: torch.dtype) -> None:
    """Real shapes and tails, few rows and many, against the exact product, twice the same."""
    for (rows, columns), symmetric in itertools.product(
        ((4608, 4096), (512, 13696), (66, 1280)), (True, False)
    ):
        if columns % (group or 1):
            continue
        tensor = quantized(rows, columns, Scheme(bits, group, symmetric))
        weight = interleaved(tensor)
        exact_weight = tensor.dequantize().to(GPU)
        bias = torch.randn(rows, device=GPU).to(dtype)
        for m in (0, 1, 2, 5, 8, 16, 17, 300):
            x = torch.randn(m, columns, device=GPU).to(dtype)
            operands = (weight.packed, weight.scale, weight.zero_point, bias, bits)
            found, exact = ops.linear(x, *operands), x.float() @ exact_weight.t() + bias
            assert torch.equal(found, ops.linear(x, *operands))
            if m:
                assert float((found - exact).abs().max() / exact.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_weights_are_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    for group, symmetric in itertools.product((32, 128, None), (True, False)):
        tensor = quantized(130, 1408, Scheme(bits, group, symmetric))
        weight = interleaved(tensor)
        found = ops.dequantize(weight.packed, weight.scale, weight.zero_point, bits, 1408, dtype)
        assert torch.equal(found.cpu(), tensor.dequantize().to(dtype))


def test_operands_as_they_come() -> None:
    tensor = quantized(64, 256, Scheme(4, 128))
    weight = interleaved(tensor)
    exact = tensor.dequantize().to(GPU)
    wide = torch.randn(6, 513, device=GPU, dtype=torch.float16)
    for x in (wide[::2, :256], wide[:, 1:257], wide[:, 1::2], wide.flatten()[3:259]):
        found = ops.linear(x, weight.packed, weight.scale, None, None, 4)
        torch.testing.assert_close(found.float(), x.float() @ exact.t(), rtol=2e-3, atol=5e-3)
    with pytest.raises(UsageError, match="do not go with"):
        ops.linear(wide[:, :256].cpu(), weight.packed, weight.scale, None, None, 4)


def test_the_kernel_is_chosen_for_few_rows() -> None:
    layer = QuantizedLinear.from_quantized(quantized(64, 256, Scheme(4, 128))).to(GPU)
    layer.arrange()
    weight = layer.weight_operands
    assert weight.layout is ops.Layout.INTERLEAVED
    names = {
        m: choice.choose(
            ops.Request.of(
                torch.empty(m, 256, dtype=torch.float16, device=GPU), weight.scale, None, 4, weight.layout
            )
        ).name
        for m in (1, 16, 17)
    }
    assert names == {1: "Triton kernel", 16: "Triton kernel", 17: "PyTorch, tile by tile"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_humming_kernels(
    bits: int, symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are installed: as exact as ours, through a layer that is loaded for them."""
    if why_not := humming.why_not(GPU, bits, symmetric, dtype):
        if "not installed" in why_not or "compute capability" in why_not:
            pytest.skip(why_not)
        pytest.fail(why_not)  # it gave a wrong result, or cannot compile
    monkeypatch.setenv("GLMQUANT_HUMMING", "1")
    scale_dtype: Any = str(dtype).removeprefix("torch.")
    for (rows, columns), group in itertools.product(((4608, 4096), (512, 13696)), (128, None)):
        tensor = quantized(rows, columns, Scheme(bits, group, symmetric, scale_dtype))
        layer = QuantizedLinear.from_quantized(tensor, torch.randn(rows).to(dtype)).to(GPU)
        layer.arrange()
        assert layer.weight_operands.layout is ops.Layout.HUMMING
        assert torch.equal(layer.dequantize().cpu(), tensor.dequantize())
        exact_weight, bias = tensor.dequantize().to(GPU), layer.bias.float()  # type: ignore[union-attr]
        for m in (0, 1, 8, 16, 17, 300):
            x = torch.randn(m, columns + 1, device=GPU).to(dtype)[:, 1:]
            found, exact = layer(x), x.float() @ exact_weight.t() + bias
            if m:
                assert float((found - exact).abs().max() / exact.abs().max()) < 2 * TOLERANCE[dtype]


def small_model(dtype: torch.dtype) -> Any:
    config = GlmConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, attention_bias=True, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GlmForCausalLM(config).to(GPU, dtype).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # clear decisions, which rounding does not turn
    return model


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_loop_gives_the_same_tokens(
    bits: int | None, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(torch.float16)
    if bits is not None:
        model.quantize(bits, group_size=32)
    ids = torch.randint(3, 1000, (3, 40), device=GPU)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = []
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(decoding, "DEVICES", devices)
        torch.manual_seed(5)
        found.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=40, max_length=None, do_sample=sampled,
                top_k=3 if sampled else None, pad_token_id=0, eos_token_id=[2, 7],
            )
        )  # fmt: skip
    assert len(decoding._steps) > 0
    width = min(t.shape[1] for t in found)
    same = (found[0][:, :width] == found[1][:, :width]).float().mean()
    assert float(same) > 0.95  # half rounds differently in another order of sums


def test_the_loop_is_a_graph_that_is_used_again() -> None:
    model = small_model(torch.bfloat16)
    model.quantize(4, group_size=128)
    ids = torch.randint(3, 1000, (2, 20), device=GPU)
    options: dict[str, Any] = {
        "do_sample": False,
        "max_length": None,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    first = model.generate(ids, max_new_tokens=30, **options)
    run = decoding._steps[model][0]
    graph = run._graph
    assert graph is not None
    assert torch.equal(model.generate(ids, max_new_tokens=30, **options), first)
    assert decoding._steps[model][0] is run
    assert run._graph is graph
