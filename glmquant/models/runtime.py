"""What every model that `glmquant.load` returns can do, whatever its architecture."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import quantizers
from ..errors import QuantizationError, UsageError
from ..quantizers import Quantizer
from ..scheme import GROUP_SIZES, Scheme
from .arranging import arrange
from .quantized import QuantizedEmbedding, QuantizedLinear

logger = logging.getLogger(__name__)

_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
# What THUDM's quantize() takes beside, about kernels to compile and caches to keep; there is nothing like it here.
_WITHOUT_EFFECT = frozenset({
    "compile_parallel_kernel", "kernel_file", "parallel_num", "source_code", "use_quantization_cache",
})  # fmt: skip
# Weights in one call of a quantizer: see `glmquant._quantize`; a GPU wants few, large launches.
_BLOCK_WEIGHTS = {"cpu": 1 << 19}
_LARGE_BLOCK_WEIGHTS = 1 << 24


class PreciseRotary(nn.Module):
    """Mixin for rotary embeddings: frequencies stay float32 in a model of any dtype, and are never on the meta device.

    ``.half()`` on a whole model rounds buffers too; frequencies rounded to half turn angles at position 1000 by up to
    half a radian.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):  # not stored in checkpoints, so nothing would ever fill them
            super().__init__(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def unrounded(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(unrounded, recurse)  # type: ignore[no-untyped-call]
        return self


class RuntimeMixin:
    """Mixin for transformers models: quantizing in place, and what packed layers change."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; the stored scales of packed weights say nothing about that."""
        parameters: Iterator[tuple[str, Tensor]] = self.named_parameters()  # type: ignore[attr-defined]
        return next(
            p.dtype for name, p in parameters if p.is_floating_point() and not name.endswith("_scale")
        )

    @property
    def quantized_bits(self) -> int | None:
        """Bits of the packed linear layers; None for a 16-bit model, the smallest where they are mixed."""
        modules: Any = self.modules()  # type: ignore[attr-defined]
        return min((m.scheme.bits for m in modules if isinstance(m, QuantizedLinear)), default=None)

    @torch.no_grad()
    def quantize(
        self,
        bits: int,
        empty_init: bool = False,
        device: torch.device | str | int | None = None,
        *,
        group_size: int | None = 128,
        method: str = "mse",
        **kwargs: Any,
    ) -> Self:
        """Quantize every linear layer but the output head in place, one after the other.

        Args:
            bits: 4 or 8.
            empty_init: accepted because THUDM's method has it; it means nothing here.
            device: where the model goes afterwards; None leaves it where it is.
            group_size: columns that share a scale (32, 64, 128), None for the whole row. Where a group does not
                divide the width of a layer, the next smaller one that does is used, and the row if there is none.
            method: ``mse`` or ``rtn``, see `glmquant.quantizers`.
            kwargs: what else THUDM's method has, such as `kernel_file`, is accepted and means nothing here.

        Returns:
            The model itself. One that is quantized already is left as it is, with a warning, as in THUDM's code.

        Raises:
            UsageError: bits, groups or a method that do not exist, or a model spread over devices.
            QuantizationError: a weight holds NaN or infinity; names the layer.
        """
        if kwargs.pop("quantize_embeddings", False):
            raise UsageError(
                "quantize() leaves the embedding as it is; glmquant.convert with quantize_embeddings writes a "
                "checkpoint in which it is quantized."
            )
        if unknown := sorted(kwargs.keys() - _WITHOUT_EFFECT):
            raise UsageError(f"quantize() has no option {', '.join(unknown)}; leave it out.")
        Scheme(bits, group_size)  # refuses what does not exist, before anything is changed
        quantizer = quantizers.get(method)
        if self.quantized_bits is not None:
            logger.warning(
                "The model is quantized already (int%d); it was left as it is.", self.quantized_bits
            )
            return self
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            raise UsageError(
                "a model spread over devices cannot be quantized in place; load it without device_map."
            )
        for parent, name, layer, path in self._linear_layers():
            scheme = Scheme(
                bits,
                _fitting_group(layer.in_features, group_size),
                scale_dtype=_SCALE_DTYPES[layer.weight.dtype],  # type: ignore[arg-type]
            )
            try:
                packed = _quantize_linear(layer, scheme, quantizer)
            except QuantizationError as error:
                raise QuantizationError(f"{path} cannot be quantized: {error}.") from None
            setattr(parent, name, packed)
        if device is not None:
            self.to(device)  # type: ignore[attr-defined]
        _put_side_by_side(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[misc]
        _put_side_by_side(self)
        return self

    def _linear_layers(self) -> list[tuple[nn.Module, str, nn.Linear, str]]:
        """Parent, name in it, layer and full name of the linear layers to quantize."""
        head = self.get_output_embeddings()  # type: ignore[attr-defined]
        modules: list[tuple[str, nn.Module]] = list(self.named_modules())  # type: ignore[attr-defined]
        return [
            (parent, name, layer, f"{path}.{name}" if path else name)
            for path, parent in modules
            for name, layer in parent.named_children()
            if isinstance(layer, nn.Linear) and layer is not head
        ]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Save a 16-bit model as transformers does.

        Raises:
            UsageError: the model is quantized. Packed weights in memory are no file format.
        """
        packed = (QuantizedLinear, QuantizedEmbedding)
        if any(isinstance(module, packed) for module in self.modules()):  # type: ignore[attr-defined]
            raise UsageError(
                "a quantized model cannot be saved from memory; glmquant.convert writes a quantized checkpoint from "
                "the 16-bit folder, in less memory."
            )
        return super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def _put_side_by_side(model: Any) -> None:
    """Weights as they are fastest where they lie now: moved and quantized ones are no longer next to each other."""
    from .fused import fuse  # imports two models of transformers

    arrange(model)
    if not hasattr(model, "hf_device_map"):
        fuse(model)


def _fitting_group(columns: int, wanted: int | None) -> int | None:
    sizes = [] if wanted is None else [g for g in GROUP_SIZES if g <= wanted and columns % g == 0]
    return max(sizes, default=None)


def _quantize_linear(layer: nn.Linear, scheme: Scheme, quantizer: Quantizer) -> QuantizedLinear:
    weight = layer.weight
    packed = QuantizedLinear(layer.in_features, layer.out_features, False, scheme, weight.device)
    packed.bias = layer.bias
    step = max(1, _BLOCK_WEIGHTS.get(weight.device.type, _LARGE_BLOCK_WEIGHTS) // layer.in_features)
    for start in range(0, layer.out_features, step):
        packed.write_rows(start, quantizer(weight[start : start + step], scheme))
    return packed.train(layer.training)
