"""Plain 16-bit safetensors: nothing is quantized, only laid out anew or merged with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..recipe import Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import Abilities, FormatBase, StoredWeight, refuse_quantizing

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family


class Plain(FormatBase):
    """See the module."""

    name = "safetensors"
    abilities = Abilities(
        bits=(16,),
        groups=(),
        methods=(),
        layouts=("native", "original"),
        runtimes=("glmquant", "transformers", "vllm"),
    )

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return not config.get("quantization_config") and not config.get("quantization_bit")

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        refuse_quantizing(recipe)

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`; never used."""
        raise AssertionError("plain checkpoints hold no quantized weights")

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`; never used."""
        raise AssertionError("plain checkpoints hold no quantized weights")

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`; never used."""
        raise AssertionError("plain checkpoints hold no quantized weights")

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`."""
        return {}

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`."""
        return []
