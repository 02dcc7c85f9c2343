"""Golden data and small random checkpoints for the tests of schemes, quantizers and formats."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers_weights import WEIGHT_KINDS as WEIGHT_KINDS
from helpers_weights import random_weight as random_weight
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
QUICK = settings(max_examples=40)
MATRICES = ("normal", "heavy_tail", "wide_scale_spread", "edge_rows", "undefined_rows")


@cache
def golden_matrices() -> dict[str, Tensor]:
    """What THUDM's quantizer makes of single matrices."""
    return load_file(GOLDEN / "quantization/matrices.safetensors")


@cache
def golden_row_names() -> dict[str, Any]:
    """What the rows of `edge_rows` and `undefined_rows` are."""
    return json.loads((GOLDEN / "quantization/matrices.json").read_text())


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def chatglm2_config(**changes: Any) -> dict[str, Any]:
    """A config.json of the ChatGLM2 architecture with widths that groups of 32, 64 and 128 divide."""
    config = load_json(GOLDEN / "chatglm3-6b/tiny/bin-fp16/config.json")
    config.update(hidden_size=128, ffn_hidden_size=128, num_layers=2, kv_channels=32)
    config.update(changes)
    return config


def write_chatglm2(folder: Path, dtype: torch.dtype = torch.float16, **changes: Any) -> dict[str, Tensor]:
    """Write a random checkpoint with `chatglm2_config(**changes)`; returns its tensors."""
    config = chatglm2_config(torch_dtype=str(dtype).removeprefix("torch."), **changes)
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    head_dim = config["kv_channels"]
    q = head_dim * config["num_attention_heads"]
    qkv = q + 2 * head_dim * config["multi_query_group_num"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attention.query_key_value.weight": (qkv, hidden),
            prefix + "self_attention.query_key_value.bias": (qkv,),
            prefix + "self_attention.dense.weight": (hidden, q),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            prefix + "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.2 * noise if "layernorm" in name else noise * 0.1).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )
