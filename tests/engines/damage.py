"""Ways in which a checkpoint could be subtly wrong.

A comparison that never fails proves nothing, so some of them are made on purpose, on the judge's side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from glmquant.scheme import QuantizedTensor

Damage = Callable[[str, QuantizedTensor | None, Tensor], Tensor]
"""Called with a name, the weight as it is quantized (None in 16 bit) and its values; returns what the judge computes
with: the same values where there is nothing to damage.
"""


def pairs_swapped(name: str, stored: QuantizedTensor | None, values: Tensor) -> Tensor:
    """The weights of each pair of columns exchanged, as halves of a byte may be, in one matrix out of 120."""
    if not name.endswith(
        ("layers.15.self_attn.k_proj.weight", "layers.15.self_attention.query_key_value.weight")
    ):
        return values
    return values.view(values.shape[0], -1, 2).flip(-1).reshape(values.shape)


def zero_points_off(name: str, stored: QuantizedTensor | None, values: Tensor) -> Tensor:
    """The zero point of the last group of each row too high by one, in the matrices of attention."""
    if stored is None or "self_attn" not in name:
        return values
    assert stored.zero_point is not None
    zero_point = stored.zero_point.clone()
    zero_point[:, -1] += 1
    return replace(stored, zero_point=zero_point).dequantize()
