"""The layers of a model on a CPU as one call for each token: `compiled_layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ops
from ..ops import decoding_native
from ..ops.layers_native import Attention, CompiledLayers, Layer, Product
from .fused import JointGlmAttention
from .quantized import QuantizedLinear


def compiled_layers(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor]) -> CompiledLayers | None:
    """The layers of a model with the cache that they use; None where they are not all of packed weights on a CPU.

    Args:
        model: one that `glmquant.models.step.why_not` has nothing against.
        keys: for each layer [slots, groups, capacity, width], contiguous.
        values: the same.
    """
    if decoding_native.why_not(model.device) is not None:
        return None
    layers = []
    for layer in model.model.layers:
        products = [_joint_product(layer.self_attn)]
        products += [
            _product(p) for p in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        ]
        if None in products:
            return None
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if any(norm.variance_epsilon != model.model.norm.variance_epsilon for norm in norms):
            return None
        layers.append(Layer(*(norm.weight for norm in norms), *products))
    attention = Attention(
        model.config.num_attention_heads,
        model.model.layers[0].self_attn.scaling,
        model.model.norm.variance_epsilon,
    )
    return CompiledLayers(layers, attention, keys, values)


def _joint_product(attention: Any) -> Product | None:
    if not isinstance(attention, JointGlmAttention) or type(attention.q_proj) is not QuantizedLinear:
        return None
    operands = attention.joint_operands()
    if operands is None:
        return None
    packed, scale, zero_point, bias = operands
    assert packed is not None
    assert scale is not None
    first = attention.q_proj
    return Product(ops.Weight(packed, scale, zero_point), bias, first.in_features, first.scheme.bits)


def _product(layer: Any) -> Product | None:
    if type(layer) is not QuantizedLinear or not layer.has_kernels:
        return None
    return Product(layer.weight_operands, layer.bias, layer.in_features, layer.scheme.bits)
