"""Layers whose weights stay packed in memory: `QuantizedLinear` and `QuantizedEmbedding`.

Their parameters have the layout that `glmquant.ops.linear` describes. They are frozen parameters and no buffers, so
that device maps, offloading, ``state_dict`` and ``.to()`` treat them as the weights that they are.

Scales keep the dtype in which they were stored: ``.half()`` or ``.bfloat16()`` change the dtype a layer computes in,
not the numbers its weights stand for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..errors import UsageError
from ..packing import pack_int32, unpack_int32
from ..scheme import QuantizedTensor, Scheme

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_minimum")
"""Names of the parameters that a packed weight may consist of."""


class _QuantizedWeight(nn.Module):
    """A packed weight [rows, columns]; see the module."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_minimum: nn.Parameter | None

    def __init__(
        self, rows: int, columns: int, scheme: Scheme, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        scheme.check_width("a quantized layer", columns)
        self.scheme = scheme
        self._shape = (rows, columns)
        scales = (rows, scheme.groups(columns))

        def parameter(shape: tuple[int, int], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_packed = parameter((rows, -(-columns * scheme.bits // 32)), torch.int32)
        self.weight_scale = parameter(scales, getattr(torch, scheme.scale_dtype))
        offset = "none" if scheme.symmetric else "minimum" if scheme.minimum else "zero point"
        self.weight_zero_point = parameter(scales, torch.int8) if offset == "zero point" else None
        self.weight_minimum = parameter(scales, self.weight_scale.dtype) if offset == "minimum" else None

    @property
    def weight_operands(self) -> ops.Weight:
        """The weight as the operators take it."""
        return ops.Weight(self.weight_packed, self.weight_scale, self.weight_zero_point)

    @torch.no_grad()
    def write_rows(self, start: int, rows: QuantizedTensor) -> None:
        """Store `rows` from row `start` on; they have this layer's scheme and width."""
        place = slice(start, start + rows.codes.shape[0])
        self.weight_packed[place] = pack_int32(rows.codes, self.scheme.bits).to(self.weight_packed.device)
        self.weight_scale[place] = rows.scale.to(self.weight_scale.device)
        if self.weight_zero_point is not None:
            assert rows.zero_point is not None
            self.weight_zero_point[place] = rows.zero_point.to(self.weight_zero_point.device)
        if self.weight_minimum is not None:
            assert rows.minimum is not None
            self.weight_minimum[place] = rows.minimum.to(self.weight_minimum.device)

    @torch.no_grad()
    def quantized_tensor(self) -> QuantizedTensor:
        """The weight with its codes unpacked."""
        bits, columns = self.scheme.bits, self._shape[1]
        weight = ops.arranged(self.weight_operands, ops.Layout.FILE, bits, columns)
        codes = unpack_int32(weight.packed, bits, columns)
        zero_point = None if weight.zero_point is None else weight.zero_point.detach()
        minimum = None if self.weight_minimum is None else self.weight_minimum.detach()
        return QuantizedTensor(codes, weight.scale.detach(), zero_point, self.scheme, minimum)

    def dequantize(self) -> Tensor:
        """The weight that is multiplied by, float32 [rows, columns]."""
        return self.quantized_tensor().dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def unrounded(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if (
                tensor is self.weight_scale or tensor is self.weight_minimum
            ) and applied.dtype != tensor.dtype:
                return tensor.to(applied.device)
            return applied

        super()._apply(unrounded, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shape and scheme, as print(model) shows them."""
        rows, columns = self._shape
        return f"{rows} x {columns}, {self.scheme}"


class QuantizedLinear(_QuantizedWeight):
    """``nn.Linear`` with a packed weight.

    Args:
        in_features: columns of the weight, which the group size of `scheme` must divide.
        out_features: rows of the weight.
        bias: whether there is one; it is an ordinary parameter.
        scheme: how the weight is quantized.
        device: where the (uninitialized) parameters are made.
        dtype: of the bias.

    Raises:
        UsageError: groups do not divide the width.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_quantized(cls, weight: QuantizedTensor, bias: Tensor | None = None) -> Self:
        """A layer with this weight, on its device; `bias` is shared, not copied."""
        rows, columns = weight.codes.shape
        layer = cls(columns, rows, False, weight.scheme, weight.codes.device)
        layer.write_rows(0, weight)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def has_kernels(self) -> bool:
        """Whether `ops.linear` knows what the weight is made of."""
        return self.scheme.levels is None

    @torch.no_grad()
    def arrange(self) -> None:
        """Give the weight the layout that is fastest where it lies: that of the file, or one for a GPU."""
        weight, bits = self.weight_operands, self.scheme.bits
        if weight.packed.is_meta or not self.has_kernels:
            return
        columns = self.in_features
        layout = ops.best_layout(weight, bits, columns)
        if weight.layout is layout:
            return
        weight = ops.arranged(weight, layout, bits, columns)
        self.weight_packed = nn.Parameter(weight.packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.scale, requires_grad=False)
        if weight.zero_point is not None:
            self.weight_zero_point = nn.Parameter(weight.zero_point, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]. What `ops.linear` has no kernel for is unpacked a tile at a time."""
        levels = self.scheme.levels
        if levels is None:
            return ops.linear(
                x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias, self.scheme.bits
            )

        def tile(start: int, stop: int) -> Tensor:
            packed, scale = self.weight_packed[start:stop], self.weight_scale[start:stop]
            minimum = None if self.weight_minimum is None else self.weight_minimum[start:stop]
            return ops.dequantize_levels(packed, scale, minimum, levels, self.in_features, x.dtype)

        y = ops.by_tiles(x.reshape(-1, self.in_features), self.out_features, tile, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class QuantizedEmbedding(_QuantizedWeight):
    """``nn.Embedding`` with a packed weight; rows are unpacked as they are looked up.

    Args:
        num_embeddings: rows of the weight.
        embedding_dim: columns of the weight, which the group size of `scheme` must divide.
        scheme: how the weight is quantized.
        device: where the (uninitialized) parameters are made.
        dtype: of the rows that `forward` gives; follows ``.half()``, ``.float()`` and ``.to(dtype)``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., columns] of `dtype`."""
        check_ids(ids, self.num_embeddings)
        flat = ids.reshape(-1)
        zero_point = None if self.weight_zero_point is None else self.weight_zero_point[flat]
        rows = ops.dequantize(
            self.weight_packed[flat],
            self.weight_scale[flat],
            zero_point,
            self.scheme.bits,
            self.embedding_dim,
            self.dtype,
        )
        return rows.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_packed.device)).dtype
        return super()._apply(fn, recurse)


class OutputHead(nn.Linear):
    """``nn.Linear`` that reads its 16-bit weight at the speed of the memory, for a few rows on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        found = ops.linear_16(x, self.weight, self.bias)
        return super().forward(x) if found is None else found


class CheckedEmbedding(nn.Embedding):
    """``nn.Embedding`` that refuses ids it has no row for in words."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., columns]."""
        check_ids(ids, self.num_embeddings)
        return super().forward(ids)


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse token ids outside of 0..rows-1, which end a CUDA context or read another row.

    Single tokens on an accelerator pass unseen: they are the model's own, and looking at each would make it wait.

    Raises:
        UsageError: naming an id.
    """
    if torch.compiler.is_compiling() or ids.is_meta or ids.numel() == 0:
        return
    if ids.device.type != "cpu" and ids.shape[-1] == 1:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise UsageError(
            f"input_ids holds {low if low < 0 else high}, and the vocabulary has ids 0 to {rows - 1}; do tokenizer "
            "and model belong together?"
        )


def packed_names(name: str, layer: _QuantizedWeight) -> list[str]:
    """The parameters of `layer` that stand for the weight called `name` (which ends in ``.weight``)."""
    own = dict(layer.named_parameters(recurse=False))
    return [name.removesuffix("weight") + part for part in PARTS if part in own]
