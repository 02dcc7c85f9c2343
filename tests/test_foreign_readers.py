"""What the formats' own libraries, and transformers, read in what we write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from helpers_formats import QUICK, load_json, load_tensors, random_weight, write_chatglm2
from hypothesis import given
from hypothesis import strategies as st
from test_formats import NAME, assert_same, weight_of
from test_native_load import IDS, dequantized, load, logits
from torch import Tensor
from transformers import GlmForCausalLM

import glmquant
from glmquant import QuantizationError, QuantizedTensor, Recipe, Scheme, SourceError, UsageError
from glmquant.formats import Bitsandbytes, Gptq, StoredWeight, get
from glmquant.quantizers import QUANTIZERS

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_chatglm2(folder)
    return folder


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    glmquant.convert(source, source.parent / "plain", Recipe(bits=16))
    return source.parent / "plain"


# --- GPTQ ---------------------------------------------------------------------------------------------------


def gptq_weights(stored: dict[str, Tensor], module: str, bits: int, version: int) -> np.ndarray:
    """As AutoGPTQ's documentation has it, number by number; [out, in]."""
    words = {k: stored[module + k].numpy().view(np.uint32) for k in ("qweight", "qzeros")}
    scales, g_idx = stored[module + "scales"].numpy(), stored[module + "g_idx"].numpy()
    per_word, mask = 32 // bits, (1 << bits) - 1
    columns, rows = words["qweight"].shape[0] * per_word, words["qweight"].shape[1]
    result = np.empty((rows, columns), np.float32)
    for i in range(columns):
        group = g_idx[i]
        for o in range(rows):
            code = int(words["qweight"][i // per_word, o]) >> (bits * (i % per_word)) & mask
            zero = int(words["qzeros"][group, o // per_word]) >> (bits * (o % per_word)) & mask
            result[o, i] = np.float32(scales[group, o]) * (code - (zero + (1 if version == 1 else 0)))
    return result


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, "row"), (8, 64)])
def test_gptq_by_the_book(source: Path, tmp_path: Path, bits: int, group: Any, version: int) -> None:
    recipe = Recipe(bits=bits, group_size=group, format="gptq", gptq_version=version)
    glmquant.convert(source, tmp_path / "out", recipe)
    stored, ours = load_tensors(tmp_path / "out"), dequantized(tmp_path / "out")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        found = gptq_weights(stored, name.removesuffix("weight"), bits, version)
        assert np.array_equal(found, ours[name].numpy())
    section = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert section["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")
    assert section["group_size"] == (-1 if group == "row" else group)


@QUICK
@given(data=st.data())
def test_gptq_comes_back_in_any_blocks(data: st.DataObject) -> None:
    """Every tensor is transposed: rows of the weight are columns."""
    fmt = Gptq(data.draw(st.sampled_from([1, 2])))
    bits, group = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([32, 64, None]))
    scheme = Scheme(bits, group)
    rows, columns = 8 * data.draw(st.integers(1, 6)), 64 * data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    codes = torch.randint(
        scheme.qmin, scheme.qmax + 1, (rows, columns), dtype=torch.int8, generator=generator
    )
    scale = torch.randn(rows, scheme.groups(columns), generator=generator).half()
    tensor = QuantizedTensor(codes, scale, None, scheme)
    whole = fmt.encode(NAME, tensor)
    for output in fmt.outputs(NAME, (rows, columns), scheme):
        if output.constant is None:
            assert tuple(whole[output.name].shape) == output.shape
            assert output.axis == 1
    assert_same(fmt.decode(whole, weight_of(tensor)), tensor)
    step = fmt.row_multiple * data.draw(st.integers(1, 3))
    blocks = [tensor.rows(i, min(rows, i + step)) for i in range(0, rows, step)]
    for name, values in whole.items():
        assert torch.equal(torch.cat([fmt.encode(NAME, block)[name] for block in blocks], 1), values)


def test_gptq_zero_points_of_another_version_are_noticed(source: Path, tmp_path: Path) -> None:
    import json

    glmquant.convert(source, tmp_path / "out", Recipe(format="gptq", group_size=64))
    (tmp_path / "out" / "quantization_report.json").unlink()
    path = tmp_path / "out" / "config.json"
    config = load_json(path)
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    path.write_text(json.dumps(config))
    problems = glmquant.verify(tmp_path / "out").problems
    assert len(problems) == 12
    assert all("qzeros holds other zero points than gptq_v2" in problem for problem in problems)
    with pytest.raises(SourceError, match="is checkpoint_format in config"):
        glmquant.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"desc_act": True}, "desc_act True"), ({"sym": False}, "sym False"), ({"lm_head": True}, "lm_head True"),
     ({"dynamic": {"x": {}}}, "dynamic"), ({"checkpoint_format": "marlin"}, "'marlin'"), ({"bits": 3}, "3 bits")],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)  # fmt: skip
def test_gptq_of_a_kind_that_is_not_known_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    import json

    glmquant.convert(source, tmp_path / "out", Recipe(format="gptq", group_size=64))
    path = tmp_path / "out" / "config.json"
    config = load_json(path)
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match=said):
        glmquant.load(tmp_path / "out", device="cpu")


# --- GGUF ---------------------------------------------------------------------------------------------------

KINDS = {"Q4_0": Scheme(4, 32), "Q4_1": Scheme(4, 32, symmetric=False, minimum=True), "Q8_0": Scheme(8, 32)}


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["gaussian", "shifted", "heavy-tail"])
def test_gguf_dequantizes_what_we_mean(kind: str, method: str, weights: str) -> None:
    scheme = KINDS[kind]
    weight = random_weight(weights, 13, 256)
    tensor = QUANTIZERS[method](weight, scheme)
    (stored,) = get("gguf").encode(NAME, tensor).values()
    theirs = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(theirs, tensor.dequantize().numpy())
    assert_same(get("gguf").decode({NAME: stored}, weight_of(tensor)), tensor)
    # Their own rounding of the same weights, in the same blocks, is no better.
    own = gguf.quants.dequantize(
        gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind]),
        gguf.GGMLQuantizationType[kind],
    )
    if method == "mse":
        ours = (tensor.dequantize() - weight).square().sum()
        assert ours <= np.square(own - weight.float().numpy()).sum() * (1 + 1e-6)


def test_a_minimum_by_least_squares_is_never_worse_than_the_whole_range() -> None:
    scheme = KINDS["Q4_1"]
    for weights in ("gaussian", "shifted", "heavy-tail"):
        weight = random_weight(weights, 64, 128)
        errors = {
            m: (QUANTIZERS[m](weight, scheme).dequantize() - weight).view(64, 4, 32).square().sum(-1)
            for m in ("rtn", "mse")
        }
        assert bool((errors["mse"] <= errors["rtn"] * (1 + 1e-6)).all())
        assert errors["mse"].sum() < 0.95 * errors["rtn"].sum()
    constant = QUANTIZERS["mse"](torch.full((2, 32), 0.5).half(), scheme)
    assert torch.equal(constant.dequantize(), torch.full((2, 32), 0.5))


@pytest.mark.parametrize("kind", [*KINDS, "F16"])
def test_a_gguf_file_as_its_own_reader_sees_it(source: Path, tmp_path: Path, kind: str) -> None:
    bits = {"Q8_0": 8, "F16": 16}.get(kind, 4)
    out = tmp_path / "out"
    glmquant.convert(
        source, out, Recipe(bits=bits, symmetric=kind != "Q4_1", format="gguf", quantize_head=bits < 16)
    )
    reader = gguf.GGUFReader(out / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = load_json(source / "config.json")
    assert fields["general.architecture"] == "chatglm"
    assert fields["chatglm.block_count"] == config["num_layers"]
    assert fields["chatglm.attention.head_count_kv"] == config["multi_query_group_num"]
    assert fields["chatglm.rope.dimension_count"] == config["kv_channels"] // 2
    assert fields["chatglm.rope.freq_base"] == 10000
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    originals, ours = load_tensors(source), dequantized(out)
    found = {t.name: t for t in reader.tensors}
    assert found["output.weight"].tensor_type.name == ("F16" if kind == "F16" else "Q8_0")
    assert found["token_embd.weight"].tensor_type.name == "F16"
    for tensor in found.values():
        assert int(tensor.data_offset) % 32 == 0
        assert tensor.tensor_type.name == "F32" or len(tensor.shape) == 2
    prefix = "transformer.encoder.layers.1."
    for theirs, mine in (
        ("blk.1.attn_qkv", "self_attention.query_key_value"), ("blk.1.attn_output", "self_attention.dense"),
        ("blk.1.ffn_up", "mlp.dense_h_to_4h"), ("blk.1.ffn_down", "mlp.dense_4h_to_h"),
    ):  # fmt: skip
        stored = found[f"{theirs}.weight"]
        assert stored.tensor_type.name == kind
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        expected = ours.get(f"{prefix}{mine}.weight", originals[f"{prefix}{mine}.weight"].float())
        assert np.array_equal(values, expected.numpy())
    bias = found["blk.0.attn_qkv.bias"]
    assert np.array_equal(
        bias.data,
        originals["transformer.encoder.layers.0.self_attention.query_key_value.bias"].float().numpy(),
    )
    assert len(found) == 3 + 7 * config["num_layers"]
    assert glmquant.verify(out, source=source).ok


@pytest.mark.parametrize("kind", [*KINDS, "F16"])
def test_gguf_runs_here_as_its_weights_say(source: Path, plain: Path, tmp_path: Path, kind: str) -> None:
    bits = {"Q8_0": 8, "F16": 16}.get(kind, 4)
    glmquant.convert(source, tmp_path / "out", Recipe(bits=bits, symmetric=kind != "Q4_1", format="gguf"))
    glmquant.convert(tmp_path / "out", tmp_path / "wide", Recipe(bits=16, layout="native"))
    with torch.inference_mode():
        ours = glmquant.load(tmp_path / "out", device="cpu", dtype=torch.float32)(IDS).logits
    expected = logits(load(tmp_path / "wide"))  # whose weights are rounded once more, to half
    assert (ours - expected).norm() / expected.norm() < 2e-3


def test_gguf_refuses(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --layout"):
        glmquant.plan_conversion(source, Recipe(format="gguf", layout="native"))
    write_chatglm2(tmp_path / "lean", kv_channels=64)
    with pytest.raises(UsageError, match="only with 128 = heads x head size"):
        glmquant.plan_conversion(tmp_path / "lean", Recipe(format="gguf"))
    glmquant.convert(source, tmp_path / "out", Recipe(format="gguf"))
    path = tmp_path / "out" / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(SourceError, match="not a sound GGUF file"):
        glmquant.load(tmp_path / "out", device="cpu")


def test_gguf_of_a_native_model_has_split_projections(plain: Path, tmp_path: Path) -> None:
    glmquant.convert(plain, tmp_path / "out", Recipe(format="gguf"))
    names = {t.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {"blk.0.attn_q.weight", "blk.0.attn_k.bias", "blk.1.ffn_up.weight", "output_norm.weight"} <= names
    assert glmquant.verify(tmp_path / "out", source=plain).ok


# --- bitsandbytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_bitsandbytes_dequantizes_what_we_mean(double: bool) -> None:
    weight = random_weight("heavy-tail", 40, 192)
    fmt = Bitsandbytes()._of(double)
    scheme = fmt._scheme(4)
    tensor = QUANTIZERS["bitsandbytes"](weight, scheme)
    stored = fmt.encode(NAME, tensor)
    constants = {o.name: torch.tensor(o.constant, dtype=torch.uint8 if o.dtype == "U8" else torch.float32)
                 for o in fmt.outputs(NAME, (40, 192), scheme) if o.constant is not None}  # fmt: skip
    everything = {
        name.removeprefix(NAME.removesuffix("weight")): value for name, value in (stored | constants).items()
    }
    packed = everything.pop("weight")
    state = bnb.QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in everything.items()}, device=torch.device("cpu")
    )
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(theirs, tensor.dequantize().to(theirs.dtype))
    assert_same(fmt.decode(stored, StoredWeight(NAME, scheme, (40, 192))), tensor)
    direct, direct_state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    assert torch.equal(direct, packed)
    assert torch.equal(direct_state.absmax, everything["weight.absmax"])


def test_bitsandbytes_int8_is_the_librarys(source: Path, tmp_path: Path) -> None:
    glmquant.convert(source, tmp_path / "out", Recipe(bits=8, format="bitsandbytes"))
    stored, originals = load_tensors(tmp_path / "out"), load_tensors(source)
    name = "model.layers.1.mlp.down_proj."
    codes, largest, _ = bnb.int8_vectorwise_quant(
        originals["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    )
    assert torch.equal(codes, stored[name + "weight"])
    assert torch.equal(largest, stored[name + "SCB"])
    ours = dequantized(tmp_path / "out")[name + "weight"]
    torch.testing.assert_close(ours, bnb.int8_vectorwise_dequant(codes, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(format="bitsandbytes"),
        Recipe(format="bitsandbytes", double_quant=True),
        Recipe(bits=8, format="bitsandbytes"),
    ],
    ids=["nf4", "nf4-double", "int8"],
)  # fmt: skip
def test_transformers_and_we_run_bitsandbytes(
    source: Path, plain: Path, tmp_path: Path, recipe: Recipe
) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, recipe)
    assert glmquant.verify(out, source=source).ok
    expected = load(plain)
    with torch.no_grad():
        for name, weight in dequantized(out).items():
            expected.get_parameter(name).copy_(weight)
    theirs, report = GlmForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(theirs) is GlmForCausalLM
    assert not any(report.values()), report
    kinds = {type(module).__name__ for module in theirs.modules()}
    assert ("Linear8bitLt" if recipe.bits == 8 else "Linear4bit") in kinds
    exact = logits(expected)
    with torch.inference_mode():
        ours = glmquant.load(out, device="cpu", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)
    # On a CPU they compute nf4 in bfloat16, and with int8 round activations too.
    limit = 0.05 if recipe.bits == 8 else 0.03
    assert (logits(theirs) - exact).norm() / exact.norm() < limit


def test_bitsandbytes_refuses(source: Path) -> None:
    for recipe, said in (
        (Recipe(format="bitsandbytes", group_size=32), "use --group-size 64 or row"),
        (
            Recipe(format="bitsandbytes", group_size="row"),
            "with --bits 4 has groups of its own; use --group-size 64",
        ),
        (Recipe(format="bitsandbytes", bits=8, double_quant=True), "--double-quant is for nf4"),
        (Recipe(double_quant=True), "goes with --format bitsandbytes"),
        (Recipe(format="bitsandbytes", layout="original"), "use --layout native"),
        (Recipe(format="bitsandbytes", quantize_head=True), "leave out --quantize-head"),
        (Recipe(format="bitsandbytes", method="mse"), "use --method bitsandbytes"),
    ):
        with pytest.raises(UsageError, match=said):
            glmquant.plan_conversion(source, recipe)
    with pytest.raises(QuantizationError, match="infinite"):
        QUANTIZERS["bitsandbytes"](torch.full((1, 64), 1e30), Scheme(8, scale_dtype="float32"))


# --- W8A8 ---------------------------------------------------------------------------------------------------


def test_w8a8_is_what_compressed_tensors_and_transformers_read(
    source: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(bits=8, activations=8))
    stored, ours = load_tensors(out), dequantized(out)
    section = load_json(out / "config.json")["quantization_config"]
    assert section["format"] == "int-quantized"
    (group,) = section["config_groups"].values()
    assert group["input_activations"]["dynamic"] is True
    from compressed_tensors.quantization import QuantizationScheme

    for name, weight in ours.items():
        parts = {"weight": stored[name], "weight_scale": stored[name + "_scale"]}
        theirs = IntQuantizationCompressor.decompress(parts, QuantizationScheme(**group))["weight"]
        assert torch.equal(theirs, weight.to(theirs.dtype))
    expected = load(plain)
    with torch.no_grad():
        for name, weight in ours.items():
            expected.get_parameter(name).copy_(weight)
    theirs = logits(GlmForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    exact = logits(expected)
    assert 0 < (theirs - exact).norm() / exact.norm() < 0.05  # they round activations, too
    with torch.inference_mode():
        own = glmquant.load(out, device="cpu", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"group_size": 64}, "leave out --group-size"),
        ({"symmetric": False}, "leave out --group-size and --asymmetric"),
        ({"format": "gptq"}, "w8a8 goes with --format compressed-tensors"),
        ({"quantize_head": True}, "leave out --quantize-head"),
    ],
    ids=["groups", "asymmetric", "gptq", "head"],
)  # fmt: skip
def test_w8a8_refuses(source: Path, choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        glmquant.plan_conversion(source, Recipe(bits=8, activations=8, **choices))
