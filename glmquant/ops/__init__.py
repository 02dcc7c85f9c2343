"""Multiplying by weights that stay packed.

``torch.ops.glmquant.linear_w4`` and ``linear_w8`` are the operators (traceable by torch.compile); `linear` calls the
right one. How they are computed is decided in one place, `choice`, which can also say why (`explain`).
"""

from .choice import Implementation, Request, choose, explain
from .interleaved import Weight, interleave, restore
from .linear import dequantize, linear
from .native import linear_16
from .reference import by_tiles, dequantize_levels
from .triton import layout_objection

__all__ = [
    "Implementation", "Request", "Weight", "by_tiles", "choose", "dequantize", "dequantize_levels", "explain",
    "interleave", "layout_objection", "linear", "linear_16", "restore",
]  # fmt: skip
