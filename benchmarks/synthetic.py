"""Checkpoints with the shapes of the real models and random weights, for measuring speed and memory.

The values are Gaussian with the spread of real weights. A few megabytes of them are repeated: the kernels and the
disk do not notice, and building 12 GB takes seconds.

    python -m benchmarks.synthetic OUT [--model chatglm3-6b|glm-4-9b-chat] [--layers N] [--shards 7]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from glmquant import families
from glmquant.checkpoint.sink import ShardedSink, ShardLayout, StoredTensor
from glmquant.families import Role

_PERIOD = (1 << 22) + 17  # weights until the values repeat; odd, so that no two rows are alike

_COMMON: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "chatglm3-6b": _COMMON
    | {
        "num_layers": 28,
        "padded_vocab_size": 65024,
        "seq_length": 8192,
        "layernorm_epsilon": 1e-5,
        "torch_dtype": "float16",
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "glm-4-9b-chat": _COMMON
    | {
        "num_layers": 40,
        "padded_vocab_size": 151552,
        "seq_length": 131072,
        "layernorm_epsilon": 1.5625e-07,
        "rope_ratio": 500,
        "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
    },
}


def build(out: Path, model: str = "chatglm3-6b", layers: int | None = None, shards: int = 7) -> Path:
    """Write a checkpoint of `model`'s shapes to `out`, unless it is there already; returns `out`."""
    config = MODELS[model] | ({"num_layers": layers} if layers else {})
    if (out / "config.json").exists():
        if json.loads((out / "config.json").read_text()) == config:
            return out
        raise SystemExit(f"{out} holds another checkpoint; remove it or choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    family = families.detect(config)
    dims = family.dims(config)
    dtype = torch.float16 if config["torch_dtype"] == "float16" else torch.bfloat16
    spelled = "F16" if dtype is torch.float16 else "BF16"
    tensors = [StoredTensor(t.name, spelled, t.shape) for t in family.tensors(dims)]
    roles = {t.name: t.role for t in family.tensors(dims)}
    layouts = _split(tensors, shards)
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(_PERIOD, generator=generator) * 0.02).to(dtype)
    sink = ShardedSink(partial, layouts)
    offset = 0
    for layout in layouts:
        for tensor in layout.tensors:
            left = tensor.nbytes // 2
            if roles[tensor.name] is Role.NORM:
                sink.write_rows(tensor.name, torch.ones(left, dtype=dtype))
                continue
            while left:
                count = min(left, _PERIOD - offset)
                sink.write_rows(tensor.name, values[offset : offset + count])
                offset = (offset + count) % _PERIOD
                left -= count
    sink.close()
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors)},
        "weight_map": {t.name: layout.file for layout in layouts for t in layout.tensors},
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    os.sync()
    partial.rename(out)
    return out


def build_tiny(out: Path) -> Path:
    """A ChatGLM3 of one small layer: to see that a program works."""
    small = {
        "num_layers": 1,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "kv_channels": 32,
    }
    MODELS["tiny"] = MODELS["chatglm3-6b"] | small | {"padded_vocab_size": 320}
    try:
        return build(out, "tiny", shards=1)
    finally:
        del MODELS["tiny"]


def _split(tensors: list[StoredTensor], shards: int) -> list[ShardLayout]:
    """Cut into `shards` files of about the same size."""
    total = sum(t.nbytes for t in tensors)
    filled: list[list[StoredTensor]] = [[] for _ in range(shards)]
    before = 0
    for tensor in tensors:
        filled[min(shards - 1, before * shards // total)].append(tensor)
        before += tensor.nbytes
    filled = [part for part in filled if part]
    return [
        ShardLayout(f"model-{n:05d}-of-{len(filled):05d}.safetensors", tuple(part))
        for n, part in enumerate(filled, 1)
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="chatglm3-6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shards", type=int, default=7)
    options = parser.parse_args()
    print(build(options.out, options.model, options.layers, options.shards))


if __name__ == "__main__":
    main()
