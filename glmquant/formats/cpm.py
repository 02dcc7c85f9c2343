"""THUDM's own INT4 / INT8 checkpoints: original names, one half scale per row, ``quantization_bit`` in config.json.

For a weight [out, in]:

    weight        int8 [out, in]      8 bit: the codes
                  int8 [out, in/2]    4 bit: two's complement nibbles, the EVEN column in the HIGH half
    weight_scale  half [out]

ChatGLM-6B may also quantize its embedding and (tied, stored twice) head in this way: ``quantization_embeddings``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..errors import SourceError, UsageError
from ..families import Role
from ..recipe import CALIBRATED, Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import Abilities, FormatBase, StoredWeight, resolve_scheme

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family


class Cpm(FormatBase):
    """See the module."""

    name = "cpm"
    abilities = Abilities(
        bits=(4, 8),
        groups=("row",),
        methods=("thudm", "mse", "rtn", *CALIBRATED),
        layouts=("original",),
        tied_head=True,
    )

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        # The original configuration classes write 0 for "not quantized".
        return bool(config.get("quantization_bit"))

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        # Before the method is looked at, whose advice would be another method: none has groups here.
        resolve_scheme(recipe, self.abilities, self.name, "float16")
        first = family.name == "chatglm"
        if recipe.quantize_embeddings and not first:
            raise UsageError(
                "only ChatGLM-6B can have quantized embeddings in --format cpm; leave out --quantize-embeddings."
            )
        if recipe.quantize_head and not recipe.quantize_embeddings:
            raise UsageError(
                "--format cpm has no quantized head of its own; "
                + (
                    "use --quantize-embeddings, which covers embedding and head."
                    if first
                    else "leave out --quantize-head, or use --format compressed-tensors."
                )
            )

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """See `Format`. There is one bit width for everything, and embedding and head go together."""
        return dict.fromkeys((Role.EMBEDDING, Role.HEAD), linear) if recipe.quantize_embeddings else {}

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        rows, columns = shape
        if scheme.bits == 4 and columns % 2:
            raise UsageError(f"{name} has {columns} columns; INT4 in --format cpm needs an even number.")
        width = columns // 2 if scheme.bits == 4 else columns
        return (
            StoredTensor(name, "I8", (rows, width)),
            StoredTensor(name + "_scale", "F16", (rows,)),
        )

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`."""
        from ..packing import pack_nibbles_high_first

        codes = tensor.codes
        packed = pack_nibbles_high_first(codes) if tensor.scheme.bits == 4 else codes
        return {name: packed, name + "_scale": tensor.scale.squeeze(1)}

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`."""
        from ..packing import unpack_nibbles_high_first

        codes = stored[weight.name]
        if weight.scheme.bits == 4:
            codes = unpack_nibbles_high_first(codes)
        return QuantizedTensor(codes, stored[weight.name + "_scale"].unsqueeze(1), None, weight.scheme)

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`."""
        extra: dict[str, Any] = {"quantization_bit": recipe.bits}
        if family.name == "chatglm":
            extra["quantization_embeddings"] = recipe.quantize_embeddings
        return extra

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`."""
        bits = config["quantization_bit"]
        if bits not in (4, 8) or not isinstance(bits, int):
            raise SourceError(f"config.json has quantization_bit {bits!r}; THUDM's checkpoints have 4 or 8.")
        scheme = Scheme(bits=bits, scale_dtype="float16")
        roles = {Role.LINEAR}
        if config.get("quantization_embeddings"):
            roles |= {Role.EMBEDDING, Role.HEAD}
        return [
            StoredWeight(spec.name, scheme, (spec.shape[0], spec.shape[1]), spec.role)
            for spec in family.tensors(dims)
            if spec.role in roles
        ]
