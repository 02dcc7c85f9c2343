"""Multiplying by weights that stay packed.

``torch.ops.glmquant.linear_w4`` and ``linear_w8`` are the operators (traceable by torch.compile); `linear` calls the
right one. How they are computed is decided in one place, `choice`, which can also say why (`explain`).
"""

from .choice import Implementation, Request, best_layout, choose, explain
from .layouts import arranged
from .linear import dequantize, linear
from .native import linear_16
from .reference import by_tiles, dequantize_levels
from .triton import layout_objection
from .weight import Layout, Weight

__all__ = [
    "Implementation", "Layout", "Request", "Weight", "arranged", "best_layout", "by_tiles", "choose", "dequantize",
    "dequantize_levels", "explain", "layout_objection", "linear", "linear_16",
]  # fmt: skip
