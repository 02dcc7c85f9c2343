"""Formats: what is decoded is what was encoded, as the formats' own libraries see it too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers_formats import (
    GOLDEN,
    QUICK,
    load_json,
    load_tensors,
    random_weight,
    same_bytes,
    write_chatglm2,
)
from hypothesis import given
from hypothesis import strategies as st

import glmquant
from glmquant import Recipe
from glmquant.checkpoint.source import torch_dtype
from glmquant.errors import QuantizedSourceError
from glmquant.formats import FORMATS, StoredWeight, detect, get
from glmquant.quantizers import QUANTIZERS
from glmquant.scheme import QuantizedTensor, Scheme

NAME = "model.layers.0.mlp.down_proj.weight"
GROUPS = {"g32": 32, "g64": 64, "g128": 128, "row": None}
FORMAT_GROUPS = {"compressed-tensors": [None, 32, 64, 128], "cpm": [None]}


@st.composite
def quantized(draw: st.DrawFn, name: str) -> QuantizedTensor:
    """Anything that a format can hold: every code, any scale, odd widths."""
    bits = draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from(FORMAT_GROUPS[name]))
    ct = name == "compressed-tensors"
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"] if ct else ["float16"]))
    scheme = Scheme(bits, group, draw(st.booleans()) if ct else True, dtype)
    rows = draw(st.integers(1, 40))
    columns = draw(st.integers(1, 3)) * group if group else draw(st.integers(1, 50))
    if name == "cpm" and bits == 4:
        columns *= 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    low, high = scheme.qmin, scheme.qmax + 1
    shape = (rows, scheme.groups(columns))
    scale = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    scale[0] = 0
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8, generator=generator)
    return QuantizedTensor(codes, scale, zero, scheme)


def assert_same(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert first.scale.dtype == second.scale.dtype
    assert (first.zero_point is None) == (second.zero_point is None)
    if first.zero_point is not None and second.zero_point is not None:
        assert torch.equal(first.zero_point, second.zero_point)
    assert torch.equal(first.dequantize(), second.dequantize())


def weight_of(tensor: QuantizedTensor) -> StoredWeight:
    rows, columns = tensor.codes.shape
    return StoredWeight(NAME, tensor.scheme, (rows, columns))


@pytest.mark.parametrize("name", FORMAT_GROUPS)
@QUICK
@given(data=st.data())
def test_what_is_encoded_comes_back(name: str, data: st.DataObject) -> None:
    fmt = get(name)
    tensor = data.draw(quantized(name))
    weight = weight_of(tensor)
    stored = fmt.encode(NAME, tensor)
    planned = {t.name: t for t in fmt.outputs(NAME, weight.shape, weight.scheme)}
    assert set(stored) == {name for name, t in planned.items() if t.constant is None}
    for part, rows in stored.items():
        assert tuple(rows.shape) == planned[part].shape
        assert rows.dtype == torch_dtype(planned[part].dtype)
    assert_same(fmt.decode(stored, weight), tensor)


@pytest.mark.parametrize("name", FORMAT_GROUPS)
@QUICK
@given(data=st.data())
def test_row_blocks_are_rows_of_the_whole(name: str, data: st.DataObject) -> None:
    """Blocks that begin at multiples of `row_multiple` can be encoded, and decoded, one at a time."""
    fmt = get(name)
    tensor = data.draw(quantized(name))
    rows = tensor.codes.shape[0]
    step = fmt.row_multiple * data.draw(st.integers(1, 3))
    whole = fmt.encode(NAME, tensor)
    pieces: dict[str, list[torch.Tensor]] = {part: [] for part in whole}
    for start in range(0, rows, step):
        block = tensor.rows(start, min(rows, start + step))
        stored = fmt.encode(NAME, block)
        assert_same(fmt.decode(stored, weight_of(block)), block)
        for part, values in stored.items():
            pieces[part].append(values)
    for part, values in pieces.items():
        assert torch.equal(torch.cat(values), whole[part]), part


def their_scheme(scheme: Scheme) -> QuantizationScheme:
    strategy = "channel" if scheme.group_size is None else "group"
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=scheme.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_decompresses_what_we_dequantize(
    bits: int, group: str, symmetric: bool, dtype: Any
) -> None:
    """Its own code, on our tensors: exactly our weights in the scale's dtype."""
    scheme = Scheme(bits, GROUPS[group], symmetric, dtype)
    for method, rows in (("rtn", 24), ("mse", 13)):
        weight = random_weight("shifted", rows, 256, getattr(torch, dtype))
        tensor = QUANTIZERS[method](weight, scheme)
        stored = {
            k.removeprefix("model.layers.0.mlp.down_proj."): v
            for k, v in get("compressed-tensors").encode(NAME, tensor).items()
        }
        stored["weight_shape"] = torch.tensor(weight.shape)
        theirs = PackedQuantizationCompressor.decompress(stored, their_scheme(scheme))["weight"]
        assert theirs.dtype == getattr(torch, dtype)
        assert torch.equal(theirs, tensor.dequantize().to(theirs.dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_compresses_to_the_same_tensors(bits: int, group: str, symmetric: bool) -> None:
    """Zero points included, which it packs along rows."""
    scheme = Scheme(bits, GROUPS[group], symmetric, "float32")
    tensor = QUANTIZERS["rtn"](random_weight("shifted", 24, 256), scheme)
    module = {"weight": tensor.dequantize(), "weight_scale": tensor.scale}
    if tensor.zero_point is not None:
        module["weight_zero_point"] = tensor.zero_point
    theirs = PackedQuantizationCompressor.compress(module, their_scheme(scheme))
    ours = get("compressed-tensors").encode("weight", tensor)
    (constant,) = (
        t for t in get("compressed-tensors").outputs("weight", (24, 256), scheme) if t.constant is not None
    )
    assert constant.constant is not None
    assert theirs.pop(constant.name).tolist() == list(constant.constant)
    assert theirs.keys() == ours.keys()
    for part, values in theirs.items():
        assert torch.equal(values, ours[part]), part
        assert values.dtype == ours[part].dtype


# --- THUDM's own checkpoints --------------------------------------------------------------------------------

PUBLISHED = [
    pytest.param("chatglm-6b/tiny-3l", "tiny-3l-int4", {}, id="v1-int4"),
    pytest.param("chatglm-6b/tiny-3l", "tiny-3l-int8", {"bits": 8}, id="v1-int8"),
    pytest.param(
        "chatglm-6b/tiny-3l", "tiny-3l-int4-embeddings", {"quantize_embeddings": True}, id="v1-int4-qe"
    ),
    pytest.param("chatglm2-6b/tiny", "tiny-int4", {}, id="v2-int4"),
    pytest.param("chatglm2-6b/tiny", "tiny-int8", {"bits": 8}, id="v2-int8"),
    pytest.param("chatglm3-6b/tiny", "tiny-int4", {}, id="v3-int4"),
    pytest.param("chatglm3-6b/tiny", "tiny-int8", {"bits": 8}, id="v3-int8"),
]


@pytest.mark.parametrize(("model", "quantized_as", "choices"), PUBLISHED)
def test_cpm_is_thudm_byte_for_byte(
    tmp_path: Path, model: str, quantized_as: str, choices: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    glmquant.convert(GOLDEN / model / "bin-fp16", out, Recipe(format="cpm", **choices))
    expected = (GOLDEN / model).parent / quantized_as
    ours, theirs = load_tensors(out), load_tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bytes(ours[name], theirs[name])] == []
    config, published = load_json(out / "config.json"), load_json(expected / "config.json")
    assert published["quantization_bit"] == choices.get("bits", 4)
    published.pop("auto_map")  # names Python files of the folder, which are not carried along
    assert config == published


@pytest.mark.parametrize(("model", "quantized_as", "choices"), PUBLISHED)
def test_thudm_checkpoints_are_read(model: str, quantized_as: str, choices: dict[str, Any]) -> None:
    """Every quantized weight decodes to the half weight's neighbour on its grid."""
    folder = (GOLDEN / model).parent / quantized_as
    found = glmquant.verify(folder, source=GOLDEN / model / "bin-fp16")
    assert found.ok, found.problems
    linear = 4 * load_json(folder / "config.json")["num_layers"]
    assert found.quantized == linear + (2 if choices.get("quantize_embeddings") else 0)
    limit = 0.02 if choices.get("bits") == 8 else 0.2
    assert all(0 < error < limit for error in found.errors.values())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_split_and_fused_layouts_hold_the_same_codes(tmp_path: Path, method: str, symmetric: bool) -> None:
    """q, k and v of the native layout, put together, are query_key_value of the original one, word for word."""
    write_chatglm2(tmp_path / "source")
    parts = {}
    for layout in ("native", "original"):
        recipe = Recipe(group_size=32, method=method, symmetric=symmetric, layout=layout)
        glmquant.convert(tmp_path / "source", tmp_path / layout, recipe)
        parts[layout] = load_tensors(tmp_path / layout)
    suffixes = ["packed", "scale", *([] if symmetric else ["zero_point"])]
    for layer in range(2):
        for suffix in suffixes:
            split = torch.cat(
                [parts["native"][f"model.layers.{layer}.self_attn.{p}_proj.weight_{suffix}"] for p in "qkv"]
            )
            fused = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.weight_{suffix}"
            assert torch.equal(split, parts["original"][fused])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_bit": 4}, "cpm"),
        ({"quantization_bit": 0}, "safetensors"),
        ({"quantization_config": None}, "safetensors"),
        ({}, "safetensors"),
    ],
    ids=["ct", "cpm", "zero-bits", "null", "plain"],
)
def test_formats_are_told_apart_by_config(config: dict[str, Any], name: str) -> None:
    assert detect(config) is FORMATS[name]


def test_a_foreign_quantization_is_refused_by_name() -> None:
    with pytest.raises(QuantizedSourceError, match="quantized with awq"):
        detect({"quantization_config": {"quant_method": "awq"}})


def test_bytes_of_a_plan_are_those_of_its_tensors() -> None:
    """A figure to check by hand: 4-bit codes, half scales, and a shape of 16 bytes."""
    outputs = get("compressed-tensors").outputs(NAME, (4096, 13696), Scheme(4, 128))
    assert math.fsum(t.nbytes for t in outputs) == 4096 * 13696 / 2 + 4096 * 107 * 2 + 16
    asymmetric = get("compressed-tensors").outputs(NAME, (4096, 13696), Scheme(4, 128, symmetric=False))
    assert sum(t.nbytes for t in asymmetric) - sum(t.nbytes for t in outputs) == 4096 * 107 // 2
