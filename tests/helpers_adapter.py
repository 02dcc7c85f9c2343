"""LoRA adapters of random values, made and merged by the real PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_sources import CHATGLM2, Tensors, random_tensors
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
RENAMED = {
    "self_attention.dense.": "self_attn.o_proj.",
    "mlp.dense_h_to_4h.": "mlp.gate_up_proj.",
    "mlp.dense_4h_to_h.": "mlp.down_proj.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.output_layer.": "lm_head.",
}


def original_weights() -> Tensors:
    return {name: tensor.float() for name, tensor in random_tensors(CHATGLM2).items()}


def native(tensors: Tensors) -> Tensors:
    """THUDM's tensors under the names of transformers; q, k and v apart."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for part, rows in zip("qkv", tensor.split([384, 128, 128]), strict=True):
                result[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
        else:
            result[name] = tensor
    return result


def skeleton(tensors: Tensors) -> nn.Module:
    """Modules with the names of a checkpoint: all that PEFT looks at."""
    root = nn.Module()
    for name, tensor in tensors.items():
        if not name.endswith(".weight"):
            continue
        *path, last = name.removesuffix(".weight").split(".")
        parent = root
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        bias = name.removesuffix("weight") + "bias"
        if tensor.dim() == 2:
            leaf: nn.Module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias in tensors)
        else:
            leaf = nn.LayerNorm(tensor.shape[0], bias=bias in tensors)
        parent.add_module(last, leaf)
    root.load_state_dict({n: t for n, t in tensors.items() if not n.endswith("inv_freq")})
    return root


def train(model: nn.Module, config: PeftConfig, folder: Path, *, safe: bool = True, seed: int = 3) -> Tensors:
    """Give `model` an adapter of random values, save it with PEFT, and return the weights that PEFT merges."""
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder, safe_serialization=safe)
    return {name: tensor.detach().clone() for name, tensor in peft.merge_and_unload().state_dict().items()}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": FUSED, **options})
