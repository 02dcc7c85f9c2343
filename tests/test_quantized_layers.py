"""Layers with packed weights as modules, and quantizing a model in place."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_formats import write_chatglm2
from helpers_models import expected, golden, greedy, largest_difference

import glmquant
from glmquant import QuantizationError, QuantizedTensor, Recipe, Scheme, UsageError, quantizers
from glmquant.models.quantized import QuantizedEmbedding, QuantizedLinear
from glmquant.ops import reference

IDS = (torch.arange(24)[None] * 7 + 3) % 320


def weight(scheme: Scheme, rows: int = 24, columns: int = 64) -> QuantizedTensor:
    return quantizers.get("rtn")(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)), scheme
    )


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8), Scheme(4, 64, symmetric=False)], ids=str)
def test_a_linear_layer_keeps_its_quantized_tensor(scheme: Scheme) -> None:
    tensor = weight(scheme)
    layer = QuantizedLinear.from_quantized(tensor, torch.ones(24))
    back = layer.quantized_tensor()
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scale, tensor.scale)
    assert (back.zero_point is None) == scheme.symmetric
    assert torch.equal(layer.dequantize(), tensor.dequantize())
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), x @ tensor.dequantize().t() + 1)
    assert repr(layer) == f"QuantizedLinear(24 x 64, {scheme})"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "q4_1"])
def test_levels_are_unpacked_by_tiles_to_the_same_bits(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.randn(100, 192, generator=torch.Generator().manual_seed(3))
    if kind == "nf4":
        tensor = quantizers.get("bitsandbytes")(wide, Scheme(4, 64, scale_dtype="float32", book="nf4"))
    else:
        tensor = quantizers.get("rtn")(wide, Scheme(4, 32, symmetric=False, minimum=True))
    layer = QuantizedLinear.from_quantized(tensor)
    expected = tensor.dequantize().to(dtype)
    monkeypatch.setitem(reference._TILE, "cpu", 7 * 192)  # the last tile has two rows
    assert torch.equal(layer(torch.eye(192, dtype=dtype)), expected.t())
    x = torch.randn(2, 5, 192).to(dtype)
    close = {"rtol": 2e-2, "atol": 2e-1} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer(x), x @ expected.t(), **close)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], expected.float().sum(0).to(dtype), **close)


def test_its_memory_is_that_of_the_packed_weight() -> None:
    layer = QuantizedLinear.from_quantized(weight(Scheme(4, 32), 256, 1024))
    assert sum(p.nbytes for p in layer.parameters()) == 256 * 1024 // 2 + 256 * 32 * 2
    assert not any(p.requires_grad for p in layer.parameters())


def test_state_dict_round_trip_from_the_meta_device() -> None:
    layer = QuantizedLinear.from_quantized(weight(Scheme(4, 32, symmetric=False)), torch.ones(24))
    empty = QuantizedLinear(64, 24, True, Scheme(4, 32, symmetric=False), device="meta")
    empty.to_empty(device="cpu").load_state_dict(copy.deepcopy(layer.state_dict()))
    assert list(layer.state_dict()) == ["weight_packed", "weight_scale", "weight_zero_point", "bias"]
    x = torch.randn(5, 64)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4), Scheme(4, 32, symmetric=False)], ids=str)
def test_an_embedding_looks_up_dequantized_rows(scheme: Scheme) -> None:
    tensor = weight(scheme)
    layer = QuantizedEmbedding(24, 64, scheme, dtype=torch.float32)
    layer.write_rows(0, tensor.rows(0, 10))
    layer.write_rows(10, tensor.rows(10, 24))
    ids = torch.tensor([[3, 23, 0], [9, 10, 3]])
    assert torch.equal(layer(ids), tensor.dequantize()[ids])
    assert torch.equal(layer.half()(ids), tensor.dequantize()[ids].half())
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.to(torch.float32)(ids), tensor.dequantize()[ids])


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="does not divide the 136 columns"):
        QuantizedLinear(136, 8, False, Scheme(4, 32))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "random"
    write_chatglm2(folder)
    return folder


@pytest.mark.parametrize("method", ["mse", "rtn"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_in_place_gives_what_convert_writes(
    tmp_path: Path, source: Path, bits: int, method: str
) -> None:
    glmquant.convert(source, tmp_path / "out", Recipe(bits=bits, method=method, group_size=64))
    wanted = glmquant.load(tmp_path / "out", device="cpu")
    model = glmquant.load(source, device="cpu").half()
    assert model.quantize(bits, group_size=64, method=method) is model
    assert model.quantized_bits == bits
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_layers_take_the_largest_group_that_divides() -> None:
    folder, _ = expected("chatglm3-6b/tiny")  # widths 64 and 136
    model = glmquant.load(folder, device="cpu", dtype=torch.float32).quantize(8)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.scheme == Scheme(8, 64, scale_dtype="float32")
    assert layer.mlp.down_proj.scheme == Scheme(8, None, scale_dtype="float32")
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert 0 < largest_difference(model(IDS[:, :4]).logits, plain_logits(folder, IDS[:, :4])) < 0.5


def plain_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = glmquant.load(folder, device="cpu", dtype=torch.float32)(ids).logits
    return found


def test_chatglm_6b_quantizes_in_place() -> None:
    model = glmquant.load(golden("chatglm-6b/tiny-3l"), device="cpu").float().quantize(4)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 3 * 4
    prompt = torch.tensor([[7, 8, 9, model.config.gmask_token_id, model.config.bos_token_id]])
    assert greedy(model, prompt, max_new_tokens=3).shape[1] > 5


def test_quantizing_again_leaves_the_model(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = glmquant.load(source, device="cpu").quantize(8, group_size=None)
    before = model.model.layers[0].mlp.down_proj
    with caplog.at_level(logging.WARNING):
        assert model.quantize(4) is model
    assert "quantized already (int8)" in caplog.text
    assert model.model.layers[0].mlp.down_proj is before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 3}, "3 bits"), ({"bits": 4, "group_size": 48}, "48"), ({"bits": 4, "method": "x"}, "'x'")],
)
def test_impossible_requests_change_nothing(source: Path, options: dict[str, Any], message: str) -> None:
    model = glmquant.load(source, device="cpu")
    with pytest.raises(UsageError, match=message):
        model.quantize(**options)
    assert model.quantized_bits is None


def test_a_weight_with_nan_is_named(source: Path) -> None:
    model = glmquant.load(source, device="cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj .*NaN"):
        model.quantize(4)


def test_a_quantized_model_is_not_saved_from_memory(tmp_path: Path, source: Path) -> None:
    model = glmquant.load(source, device="cpu").quantize(4)
    with pytest.raises(UsageError, match=r"glmquant\.convert"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("bits", [None, 4])
def test_ids_without_a_row_are_refused(source: Path, bits: int | None) -> None:
    model = glmquant.load(source, device="cpu")
    if bits:
        model.quantize(bits)
    for bad in (320, -1):
        with pytest.raises(UsageError, match=f"input_ids holds {bad}"):
            model(torch.tensor([[1, bad, 3]]))


def test_a_quantized_model_compiles_whole(source: Path) -> None:
    model = glmquant.load(source, device="cpu", dtype=torch.float32).quantize(4, group_size=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        wanted = model(IDS).logits
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)
