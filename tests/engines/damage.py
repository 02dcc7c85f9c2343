"""Ways in which a checkpoint could be subtly wrong.

A comparison that never fails proves nothing, so some of them are made on purpose, on the judge's side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from glmquant.scheme import QuantizedTensor

Damage = Callable[[str, QuantizedTensor], QuantizedTensor]


def nibbles_swapped(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
    """The two codes of each byte exchanged, in one matrix out of 120."""
    if not any(
        part in name for part in ("layers.15.self_attn.k_proj", "layers.15.self_attention.query_key_value")
    ):
        return tensor
    pairs = tensor.codes.view(tensor.codes.shape[0], -1, 2)
    return replace(tensor, codes=pairs.flip(-1).reshape(tensor.codes.shape))


def zero_points_off(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
    """The zero point of the last group of each row too high by one, in the matrices of attention."""
    if "self_attn" not in name:
        return tensor
    assert tensor.zero_point is not None
    zero_point = tensor.zero_point.clone()
    zero_point[:, -1] += 1
    return replace(tensor, zero_point=zero_point)
