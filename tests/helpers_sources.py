"""Small checkpoints to read from, sound and broken, and the header fixtures of the real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glmquant import GlmquantError, Recipe, SourceError, convert, families
from glmquant.checkpoint import TensorInfo

GOLDEN = Path(__file__).parent / "golden"
HEADERS = sorted(path.stem for path in (GOLDEN / "headers").glob("*.json"))
SIZES = {"F16": 2, "BF16": 2, "F32": 4}

# Every width is a multiple of 128, the default group; heads * kv_channels differs from hidden_size.
CHATGLM2: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "eos_token_id": 2,
    "ffn_hidden_size": 256,
    "hidden_size": 128,
    "kv_channels": 64,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 6,
    "num_layers": 2,
    "pad_token_id": 0,
    "padded_vocab_size": 96,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "hidden_size": 64,
    "inner_hidden_size": 128,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 128,
    "num_attention_heads": 4,
    "num_layers": 2,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "vocab_size": 96,
}

EMBEDDING = "transformer.embedding.word_embeddings.weight"
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
DOWN = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
NORM = "transformer.encoder.layers.1.input_layernorm.weight"
HEAD = "transformer.output_layer.weight"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Header:
    """A fixture of tests/golden/headers: a full-size checkpoint without its weights."""

    model: str
    config: dict[str, Any]
    total_size: int
    layers: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """name -> (dtype, shape)"""

    @classmethod
    def load(cls, name: str) -> Header:
        data = json.loads((GOLDEN / "headers" / f"{name}.json").read_text())
        tensors = {}
        for pattern, dtype, shape in data["tensors"]:
            layers = range(data["layers"]) if "{layer}" in pattern else [0]
            tensors.update({pattern.format(layer=layer): (dtype, tuple(shape)) for layer in layers})
        return cls(data["model"], data["config"], data["total_size"], data["layers"], tensors)


class HeaderSource:
    """A checkpoint of which only headers exist: a plan may look at nothing else."""

    folder = Path("full-size")
    files: tuple[Path, ...] = ()

    def __init__(self, header: Header) -> None:
        self.config = header.config
        self._infos = {
            name: TensorInfo(name, dtype, shape, "model.safetensors")
            for name, (dtype, shape) in header.tensors.items()
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def prefetch(self, shard: str) -> None:
        raise AssertionError(f"{shard} was prefetched")

    def release(self, shard: str) -> None:
        pass


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return SIZES[dtype] * math.prod(shape)


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensors:
    """Every tensor that a model of this config has, as a checkpoint stores them."""
    generator = torch.Generator().manual_seed(seed)
    family = families.detect(config)
    return {
        spec.name: (0.05 * torch.randn(spec.shape, generator=generator)).to(dtype)
        for spec in family.tensors(family.dims(config))
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_model(folder: Path, config: dict[str, Any], tensors: Tensors, *, shards: int = 1) -> Path:
    """A safetensors checkpoint; tensors are dealt out in turn to several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def write_bin(folder: Path, config: dict[str, Any], tensors: Any) -> Path:
    """A checkpoint with one pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def raw_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A file as an attacker or a broken disk may leave it: any header over any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """A tensor in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def tiny_model(tmp_path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A checkpoint with some tensors replaced, added or (None) left out."""
    config = {**CHATGLM2, **(config or {})}
    made = random_tensors(config)
    made.update({name: tensor for name, tensor in tensors.items() if tensor is not None})
    for name, tensor in tensors.items():
        if tensor is None:
            del made[name]
    return write_model(tmp_path / "model", config, made)


def refused(
    source: Path | str,
    out: Path,
    *words: str,
    error: type[GlmquantError] = SourceError,
    recipe: Recipe | None = None,
    **options: Any,
) -> str:
    """Convert, and expect a refusal of exactly this kind that says each of `words` and leaves nothing behind."""
    there = out.exists()
    with pytest.raises(error) as caught:
        convert(source, out, recipe or Recipe(), **options)
    message = str(caught.value)
    assert type(caught.value) is error, message
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert message.endswith((".", "?", ".)")), message
    assert len(message) < 600
    assert out.exists() == there
    assert not out.with_name(out.name + ".partial").exists()
    return message
