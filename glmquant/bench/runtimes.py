"""What can run a checkpoint: glmquant itself, and its peers on the same weights.

Each entry of `RUNTIMES` makes a model with transformers' ``generate`` from a `Candidate`. A peer that is not installed,
or cannot take the weights, raises, and becomes a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import glmquant
from glmquant import ops
from glmquant.errors import UsageError
from glmquant.models.quantized import QuantizedLinear

from .cases import Candidate


def _load(candidate: Candidate) -> Any:
    return glmquant.load(candidate.path, candidate.device, candidate.dtype)


class DequantizeThenMultiply(nn.Module):
    """What THUDM's quantized layers do: the whole weight in 16 bit at every call, then an ordinary product."""

    def __init__(self, packed: QuantizedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        packed = self.packed
        weight = ops.dequantize(
            packed.weight_packed,
            packed.weight_scale,
            packed.weight_zero_point,
            packed.scheme.bits,
            packed.in_features,
            x.dtype,
        )
        return functional.linear(x, weight, packed.bias)


def _dequantize(candidate: Candidate) -> Any:
    model = _load(candidate)
    if not _replace(model, QuantizedLinear, DequantizeThenMultiply):
        raise UsageError(f"{candidate.path} is not quantized, so there is nothing to dequantize.")
    return model


def _plain(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    has_bias = layer.bias is not None
    plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta", dtype=dtype)
    plain.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
    plain.bias = layer.bias  # type: ignore[assignment]
    return plain


def _unpacked(candidate: Candidate) -> Any:
    model = _load(candidate)
    _replace(model, QuantizedLinear, lambda layer: _plain(layer, model.dtype))
    return model


def _bitsandbytes(kind: str) -> Callable[[Candidate], Any]:
    def build(candidate: Candidate) -> Any:
        bnb = _package("bitsandbytes", "'glmquant[bnb]'")
        model = _unpacked(candidate)
        head, dtype, device = model.get_output_embeddings(), model.dtype, model.device

        def layer(old: nn.Linear) -> Any:
            if old is head:
                return old
            sizes = old.in_features, old.out_features, old.bias is not None
            if kind == "nf4":
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = old.bias
            return new.to(device)  # this is when it quantizes

        _replace(model, nn.Linear, layer)
        return model

    return build


def _torchao(candidate: Candidate) -> Any:
    torchao = _package("torchao.quantization", "torchao")
    model = _unpacked(candidate)
    head = model.get_output_embeddings()
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and module is not head,
    )
    return model


def _package(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"needs {error.name}: pip install {install}") from None


def _replace(model: nn.Module, kind: type[nn.Module], new: Callable[[Any], nn.Module]) -> int:
    """Put another layer in the place of every one of a kind; returns how many there were."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, module in found:
        model.set_submodule(name, new(module))
    return len(found)


RUNTIMES: dict[str, Callable[[Candidate], Any]] = {
    "glmquant": _load,
    "16bit": _unpacked,
    "dequantize": _dequantize,
    "bitsandbytes-nf4": _bitsandbytes("nf4"),
    "bitsandbytes-int8": _bitsandbytes("int8"),
    "torchao-int8": _torchao,
}
