"""All layers of a model for one token of each of some sequences in one call (``kernels/cpu/layers.cpp``).

It computes what `glmquant.ops.linear` (with `rows_alone`) and `glmquant.ops.decoding_native` do one after the
other, to the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from .._floats import FLOATS
from . import native
from .choice import Request, choose
from .decoding_native import check
from .weight import Weight


@dataclass(frozen=True)
class Product:
    """``x @ W.T + bias`` with a packed weight.

    Attributes:
        weight: packed [rows, words], with scales [rows, groups]; see `glmquant.ops.linear`.
        bias: [rows], or None.
        columns: width of the weight.
        bits: 4 or 8.
    """

    weight: Weight
    bias: Tensor | None
    columns: int
    bits: int


@dataclass(frozen=True)
class Layer:
    """One layer of a GLM model; q, k and v are rows of one weight, and so are gate and up.

    Attributes:
        input_norm: [hidden], of the norm before attention.
        middle_norm: [hidden], of the norm behind it.
        qkv: hidden -> (heads + 2 * groups) * width.
        out: heads * width -> hidden.
        gate_up: hidden -> 2 * inner.
        down: inner -> hidden.
    """

    input_norm: Tensor
    middle_norm: Tensor
    qkv: Product
    out: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class Attention:
    """What the attentions of all layers have in common.

    Attributes:
        heads: of the queries.
        scale: of the products of queries and keys.
        epsilon: of the norms.
    """

    heads: int
    scale: float
    epsilon: float


class CompiledLayers:
    """Layers, and the cache that they read and write.

    Args:
        layers: the layers; their tensors are held.
        attention: see `Attention`.
        keys: for each layer [slots, groups, capacity, width], contiguous, of the dtype of the model.
        values: the same.
    """

    def __init__(
        self, layers: Sequence[Layer], attention: Attention, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        check([*keys, *values], *(norm for layer in layers for norm in (layer.input_norm, layer.middle_norm)))
        _, groups, capacity, width = keys[0].shape
        self._layers, self._cache = list(layers), (list(keys), list(values))
        self._dtype = keys[0].dtype
        self._sizes = _Sizes(
            FLOATS[self._dtype], len(layers), layers[0].out.weight.packed.shape[0], attention.heads, groups, width,
            capacity, attention.scale, attention.epsilon,
        )  # fmt: skip
        self._tables: dict[int, ctypes.Array[_Layer] | None] = {}

    def objection(self, rows: int) -> str | None:
        """Why they cannot compute so many tokens at a time, as the end of a sentence; None if they can."""
        if self._table(rows) is None:
            return f"a product of {rows} rows is not for the compiled kernels"
        return None

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        columns: Tensor,
        *,
        slots: Tensor | None = None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the last layer makes of the tokens; their keys and values are kept.

        Args:
            hidden: [rows, hidden], contiguous; overwritten.
            cos: [rows, rotary], see `glmquant.ops.decoding.rotate_and_store`.
            sin: the same.
            columns: int64 [rows], where in its slot each token goes; it sees those before it.
            slots: int64 [rows]; None where row i is in slot i.
            first: int64 [rows], each row's first column; None for 0.

        Returns:
            `hidden`, and what is to be added to it.
        """
        rows = hidden.shape[0]
        table, library = self._table(rows), _native.library()
        assert table is not None
        assert library is not None
        check([self._cache[0][0], hidden], cos, sin)
        cos, sin, delta = cos.contiguous(), sin.contiguous(), torch.empty_like(hidden)
        with native.rows_alone():
            few = native.few(rows)
        tokens = _Tokens(
            rows, few, cos.shape[1], cos.data_ptr(), sin.data_ptr(), _pointer(slots),
            _pointer(first), columns.data_ptr(),
        )  # fmt: skip
        library.glmquant_layers(
            table, ctypes.byref(self._sizes), ctypes.byref(tokens), hidden.data_ptr(), delta.data_ptr()
        )
        return hidden, delta

    def _table(self, rows: int) -> ctypes.Array[_Layer] | None:
        if rows not in self._tables:
            filled = []
            for layer, keys, values in zip(self._layers, *self._cache, strict=True):
                products = [self._product(p, rows) for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
                if None in products:
                    break
                norms = layer.input_norm.data_ptr(), layer.middle_norm.data_ptr()
                filled.append(_Layer(*norms, keys.data_ptr(), values.data_ptr(), *products))
            whole = len(filled) == len(self._layers)
            self._tables[rows] = (_Layer * len(filled))(*filled) if whole else None
        return self._tables[rows]

    def _product(self, product: Product, rows: int) -> _Product | None:
        weight, bias = product.weight, product.bias
        tensors = [t for t in (weight.packed, weight.scale, weight.zero_point, bias) if t is not None]
        if weight.packed.dim() != 2 or not all(t.is_contiguous() for t in tensors):
            return None  # in a layout for GPUs, or untidy
        x = torch.empty(rows, product.columns, dtype=self._dtype)
        request = Request.of(x, weight.scale, weight.zero_point, product.bits)
        with native.rows_alone():
            planes = native.planes(choose(request).run, self._dtype)
        if planes is None:
            return None
        return _Product(
            weight.packed.data_ptr(), weight.scale.data_ptr(), _pointer(weight.zero_point), _pointer(bias),
            weight.packed.shape[0], product.columns, weight.packed.shape[1], weight.scale.shape[1], product.bits,
            FLOATS[weight.scale.dtype], 0 if bias is None else FLOATS[bias.dtype], planes,
        )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fields(**kinds: str) -> list[tuple[str, type]]:
    types = {"pointers": ctypes.c_void_p, "integers": ctypes.c_int64, "reals": ctypes.c_double}
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class _Product(ctypes.Structure):
    _fields_ = _fields(
        pointers="packed scale zero bias",
        integers="rows columns words groups bits scale_dtype bias_dtype planes",
    )


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(pointers="input_norm middle_norm keys values"),
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = _fields(integers="dtype layers hidden heads groups width capacity", reals="scale epsilon")


class _Tokens(ctypes.Structure):
    _fields_ = _fields(integers="rows few rotary", pointers="cos sin slots first columns")
