"""Where the weights of a model lie on a GPU: in the layout of its kernels, and q, k and v of a layer side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .quantized import QuantizedLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Joined:
    """The weights and biases of several layers as those of one, whose memory is theirs."""

    weight: ops.Weight
    bias: Tensor | None


@torch.no_grad()
def arrange(model: nn.Module) -> None:
    """Give every packed weight of `model` the layout that is fastest where it lies; see `QuantizedLinear.arrange`.

    A weight that is an embedding's too keeps the layout of the file. Interleaved projections of an attention become
    rows of one weight, which `joined` finds.
    """
    owners = Counter(
        id(module.weight_packed) for module in model.modules() if hasattr(module, "weight_packed")
    )
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and owners[id(module.weight_packed)] == 1:
            module.arrange()
    for module in model.modules():
        if all(hasattr(module, name) for name in _PROJECTIONS):
            _join(module)


def joined(attention: Any) -> Joined | None:
    """The projections of `attention` as one, if they still lie side by side."""
    found: Joined | None = getattr(attention, "_joined_projections", None)
    layers = _layers(attention)
    if (
        found is None
        or layers is None
        or layers[0].weight_packed.data_ptr() != found.weight.packed.data_ptr()
    ):
        return None
    return found


def _layers(attention: Any) -> list[QuantizedLinear] | None:
    """Its projections, if they may become one."""
    layers = [getattr(attention, name) for name in _PROJECTIONS]
    first = layers[0]
    alike = all(
        type(layer) is QuantizedLinear
        and layer.weight_operands.layout is ops.Layout.INTERLEAVED
        and layer.scheme == first.scheme
        and (layer.bias is None) == (first.bias is None)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )
    return layers if alike else None


def _join(attention: Any) -> None:
    layers = _layers(attention)
    if layers is None:
        attention._joined_projections = None
        return
    if joined(attention) is None:
        parts = [layer.weight_operands for layer in layers]
        symmetric = parts[0].zero_point is None
        whole = ops.Weight(
            torch.cat([part.packed for part in parts]),
            torch.cat([part.scale for part in parts], dim=1),
            None if symmetric else torch.cat([part.zero_point for part in parts], dim=1),  # type: ignore[misc]
        )
        start = 0
        for layer in layers:
            rows = whole.rows(start, start + layer.out_features)
            layer.weight_packed.data, layer.weight_scale.data = rows.packed, rows.scale
            if layer.weight_zero_point is not None and rows.zero_point is not None:
                layer.weight_zero_point.data = rows.zero_point
            start += layer.out_features
    else:
        whole = attention._joined_projections.weight
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])  # type: ignore[misc]
    attention._joined_projections = Joined(whole, bias)
