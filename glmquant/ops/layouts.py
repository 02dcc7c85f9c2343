"""From one layout of a packed weight to another."""

from __future__ import annotations

from . import humming, interleaved
from .weight import Layout, Weight

_FROM_FILES = {Layout.INTERLEAVED: interleaved.interleave, Layout.HUMMING: humming.arrange}
_TO_FILES = {Layout.INTERLEAVED: interleaved.restore, Layout.HUMMING: humming.restore}


def arranged(weight: Weight, layout: Layout, bits: int, columns: int) -> Weight:
    """The same weight in a layout, which it must fit (`glmquant.ops.best_layout`); itself if it has that already.

    Args:
        weight: [out, columns].
        layout: the one that is wanted.
        bits: 4 or 8.
        columns: its width.
    """
    if weight.layout is layout:
        return weight
    if weight.layout is not Layout.FILE:
        weight = _TO_FILES[weight.layout](weight, bits, columns)
    return weight if layout is Layout.FILE else _FROM_FILES[layout](weight, bits, columns)
