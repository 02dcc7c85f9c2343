"""Sound files with the wrong content: tensors that do not fit, numbers that are none, and configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_sources import (
    CHATGLM2,
    DOWN,
    EMBEDDING,
    HEAD,
    NORM,
    QKV,
    random_tensors,
    refused,
    tiny_model,
    write_json,
    write_model,
)
from safetensors.torch import load_file

import glmquant
from glmquant import (
    QuantizationError,
    Recipe,
    SourceError,
    convert,
)

NAN, INF = float("nan"), float("inf")
NOT_FINITE = {NAN: "NaN", -INF: "infinite"}
BIAS = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
BUFFER = "transformer.rotary_pos_emb.inv_freq"
CPM = Recipe(format="cpm")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Tensors that do not fit the configuration.


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(640, 64).half(), ("[640, 64]", "[640, 128]")),
        (torch.zeros(639, 128).half(), ("[639, 128]", "[640, 128]")),
        (torch.zeros(640 * 128).half(), ("[81920]", "[640, 128]")),
        (torch.tensor(1.0).half(), ("[]", "[640, 128]")),
        (torch.zeros(0, 128).half(), ("[0, 128]", "[640, 128]")),
        (torch.zeros(640, 128, dtype=torch.int8), ("I8", "F16")),
        (torch.zeros(640, 128, dtype=torch.float64), ("F64", "F16")),
        (torch.zeros(640, 128, dtype=torch.float8_e4m3fn), ("F8_E4M3", "F16")),
    ],
    ids=["columns", "rows", "flat", "scalar", "empty", "int8", "float64", "float8"],
)
def test_a_tensor_of_wrong_shape_or_dtype(
    tensor: torch.Tensor, words: tuple[str, str], tmp_path: Path, out: Path
) -> None:
    refused(tiny_model(tmp_path, **{QKV: tensor}), out, QKV, "model.safetensors", *words)


@pytest.mark.parametrize("name", [EMBEDDING, QKV, BIAS, NORM, DOWN, HEAD])
def test_a_missing_tensor(name: str, tmp_path: Path, out: Path) -> None:
    message = refused(tiny_model(tmp_path, **{name: None}), out, name, "lacks", str(tmp_path / "model"))
    assert "more" not in message


def test_several_missing_tensors(tmp_path: Path, out: Path) -> None:
    refused(
        tiny_model(tmp_path, **{QKV: None, DOWN: None, NORM: None}), out, f"lacks {QKV} and 2 more tensors"
    )


def test_stored_rotary_frequencies_may_be_missing(tmp_path: Path, out: Path) -> None:
    convert(tiny_model(tmp_path, **{BUFFER: None}), out)


@pytest.mark.parametrize(
    "name", ["transformer.encoder.layers.2.input_layernorm.weight", QKV + "_scale", "vision.weight"]
)
def test_a_foreign_tensor(name: str, tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path, **{name: torch.zeros(128).half()})
    refused(folder, out, f"holds {name},", "2 layers", str(folder))


def test_the_config_of_another_model(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    write_json(folder / "config.json", {**CHATGLM2, "num_layers": 3})
    refused(folder, out, "lacks transformer.encoder.layers.2.", "and 6 more tensors")
    write_json(folder / "config.json", {**CHATGLM2, "num_layers": 1})
    refused(folder, out, "holds transformer.encoder.layers.1.", "1 layers")


def test_a_config_that_states_a_quantization_that_is_not_there(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    write_json(folder / "config.json", {**CHATGLM2, "quantization_bit": 4})
    refused(folder, out, "says it is quantized (cpm", "and not I8 [640, 64]")
    with pytest.raises(SourceError, match=r"says it is quantized \(cpm.* but "):
        glmquant.inspect(folder)


def test_more_layers_than_any_model_has(tmp_path: Path, out: Path) -> None:
    """Nothing counts to them: a folder on a hub would stop every command that reads it."""
    folder = tiny_model(tmp_path)
    converted = convert(folder, tmp_path / "converted").out
    write_json(folder / "config.json", {**CHATGLM2, "num_layers": 10**15})
    refused(folder, out, "1000000000000000 layers, more than any model has")
    config = json.loads((converted / "config.json").read_text())
    write_json(converted / "config.json", {**config, "num_hidden_layers": 10**15})
    for command in (glmquant.inspect, glmquant.verify):
        with pytest.raises(SourceError, match="layers, more than any model has"):
            command(converted)
    with pytest.raises(SourceError, match="layers, more than any model has"):
        glmquant.check(converted, memory_limit=2**40, context=64)


# Numbers that have no quantized form.


@pytest.mark.parametrize(
    ("recipe", "workers"),
    [(Recipe(), 1), (Recipe(symmetric=False), 2), (CPM, 2), (Recipe(bits=16), 1)],
    ids=["int4", "asymmetric", "cpm", "16-bit"],
)
@pytest.mark.parametrize("value", [NAN, -INF], ids=str)
@pytest.mark.parametrize(
    "name", [QKV, DOWN, EMBEDDING, NORM, BIAS, HEAD], ids=["qkv", "down", "embedding", "norm", "bias", "head"]
)
def test_nan_and_infinity(
    name: str, value: float, recipe: Recipe, workers: int, tmp_path: Path, out: Path
) -> None:
    tensor = random_tensors(CHATGLM2)[name]
    tensor.view(-1)[-1] = value
    folder = tiny_model(tmp_path, **{name: tensor})
    refused(folder, out, name, NOT_FINITE[value], error=QuantizationError, recipe=recipe, workers=workers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", [QKV, EMBEDDING, NORM], ids=["linear", "embedding", "norm"])
@pytest.mark.parametrize("method", ["mse", "rtn"])
def test_nan_and_infinity_in_every_dtype(
    method: str, name: str, value: float, dtype: torch.dtype, tmp_path: Path, out: Path
) -> None:
    config = {**CHATGLM2, "torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = random_tensors(config, dtype)
    tensors[name].view(-1)[5] = value
    folder = write_model(tmp_path / "model", config, tensors)
    recipe = Recipe(method=method, quantize_embeddings=name == EMBEDDING)
    refused(folder, out, name, error=QuantizationError, recipe=recipe)


def test_the_rows_of_a_bad_weight_are_named(tmp_path: Path, out: Path) -> None:
    tensor = random_tensors(CHATGLM2)[QKV]
    tensor[384 + 5, 3] = NAN  # a row of k, which the native layout stores under a name of its own
    message = refused(tiny_model(tmp_path, **{QKV: tensor}), out, QKV, "rows", error=QuantizationError)
    first, last = (int(word.strip(");")) for word in message.split("rows ")[1].split()[:3:2])
    assert first <= 389 <= last


def test_rotary_frequencies_are_not_looked_at(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path, **{BUFFER: torch.full((16,), NAN).half()})
    convert(folder, out, CPM)
    assert load_file(out / "model.safetensors")[BUFFER].isnan().all()


@pytest.mark.parametrize("method", ["thudm", "rtn", "mse"])
def test_a_scale_beyond_half(method: str, tmp_path: Path, out: Path) -> None:
    """A bfloat16 weight may be larger than the scale of a format that stores halves."""
    config = {**CHATGLM2, "torch_dtype": "bfloat16"}
    tensors = random_tensors(config, torch.bfloat16)
    tensors[DOWN][7, 7] = 1e6
    folder = write_model(tmp_path / "model", config, tensors)
    recipe = Recipe(format="cpm", method=method)
    refused(
        folder, out, DOWN, "half" if method == "thudm" else "float16", error=QuantizationError, recipe=recipe
    )
    convert(folder, out)  # bfloat16 scales hold it


@pytest.mark.parametrize(
    ("name", "said"), [(DOWN, "does not fit in float16"), (NORM, "beyond the range of F16")]
)
def test_a_float32_weight_beyond_half(name: str, said: str, tmp_path: Path, out: Path) -> None:
    tensors = random_tensors(CHATGLM2, torch.float32)
    tensors[name].view(-1)[0] = 1e6
    folder = write_model(tmp_path / "model", CHATGLM2, tensors)
    refused(folder, out, name, said, error=QuantizationError)


# Configurations.


def test_an_unknown_architecture(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    refused(folder, out, "unknown architecture", "'llama'", "LlamaForCausalLM", "ChatGLM3-6B")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"a": 1} x', b"\xff\xfe{", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "more", "utf16", "deep", "number"],
)
def test_a_broken_config(content: bytes, tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "config.json").write_bytes(content)
    refused(folder, out, str(folder / "config.json"))


def test_no_config(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "config.json").unlink()
    refused(folder, out, str(folder / "config.json"), "does not exist")
    (folder / "config.json").mkdir()
    refused(folder, out, str(folder / "config.json"), "cannot be read")


@pytest.mark.parametrize("field", ["num_layers", "layernorm_epsilon"])
def test_an_incomplete_config(field: str, tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    write_json(folder / "config.json", {k: v for k, v in CHATGLM2.items() if k != field})
    refused(folder, out, "config.json", f"lacks '{field}'")


def test_no_weights(tmp_path: Path, out: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, out, str(folder), "holds no weights", "model.safetensors")
