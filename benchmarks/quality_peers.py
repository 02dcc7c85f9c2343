"""Other projects' quantizers on the same weights: what each makes of a linear layer, as the weight it stands for.

Only what needs no data, and only weights: none of their file formats or kernels. Each is imported when it is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmquant import _open, families
from glmquant.families import TensorSpec


def _gguf(kind: str) -> Callable[[Tensor], Tensor]:
    import gguf

    stored = gguf.GGMLQuantizationType[kind]
    return lambda weight: torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), stored), stored))


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    dequantized: Tensor = functional.dequantize_4bit(packed, state)
    return dequantized


def _hqq(weight: Tensor) -> Tensor:
    Quantizer = import_module("hqq.core.quantize").Quantizer
    packed, meta = Quantizer.quantize(
        weight, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
    )
    dequantized: Tensor = Quantizer.dequantize(packed, meta)
    return dequantized


# Bits for each weight, with its share of scales as the project stores them, and what gives the dequantized weight.
PEERS: dict[str, tuple[float, Callable[[], Callable[[Tensor], Tensor]]]] = {
    "llama.cpp Q4_0 (gguf)": (4.5, lambda: _gguf("Q4_0")),
    "llama.cpp Q4_1 (gguf)": (5.0, lambda: _gguf("Q4_1")),
    "bitsandbytes nf4, blocks of 64": (4.5, lambda: _nf4),
    "hqq, g64, asymmetric": (4.5, lambda: _hqq),
}


def linear_specs(source: Path) -> list[TensorSpec]:
    """The linear weights of a checkpoint."""
    config = _open.open_source(source).source.config
    family = families.detect(config)
    return [spec for unit in family.units(family.dims(config)) for spec in unit.tensors]


def write(name: str, source: Path, out: Path) -> None:
    """Write the checkpoint `source` (one safetensors file) with linear layers as the peer called `name` has them."""
    quantize = PEERS[name][1]()
    linear = {spec.name for spec in linear_specs(source)}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for tensor in file.keys():  # noqa: SIM118 - not a mapping
            weight = file.get_tensor(tensor)
            tensors[tensor] = quantize(weight.float()).to(weight.dtype) if tensor in linear else weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
