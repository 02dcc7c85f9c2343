"""Plain 16-bit safetensors: nothing is quantized, only laid out anew or merged with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..errors import UsageError
from ..recipe import Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import Abilities, StoredWeight

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family, Role


class Plain:
    """See the module."""

    name = "safetensors"
    abilities = Abilities(
        bits=(16,),
        groups=(),
        methods=(),
        layouts=("native", "original"),
        runtimes=("glmquant", "transformers", "vllm", "llama.cpp"),
        converts=True,
    )
    row_multiple = 1

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return not config.get("quantization_config") and not config.get("quantization_bit")

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        if recipe.group_size is not None or not recipe.symmetric or recipe.method is not None:
            raise UsageError(
                "--bits 16 quantizes nothing; leave out --group-size, --asymmetric and --method."
            )
        if recipe.quantize_head or recipe.quantize_embeddings:
            raise UsageError(
                "--bits 16 quantizes nothing; leave out --quantize-head and --quantize-embeddings."
            )

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """See `Format`."""
        return {}

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        return ()

    def scale_dtype(self, weight_dtype: str) -> str:
        """See `Format`; never used."""
        return "float16"

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
