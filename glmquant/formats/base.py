"""What a file format is: names, dtypes and byte order of quantized weights, and nothing about how they are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.sink import StoredTensor
from ..errors import UsageError
from ..families import Role
from ..recipe import Group, Recipe
from ..scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family

ROW: Group = "row"


@dataclass(frozen=True)
class Abilities:
    """A format's row in the table of what goes together; the first entry of each tuple is the default.

    Attributes:
        bits: of quantized weights; 16 where there are none.
        groups: columns that share a scale.
        methods: quantizers.
        layouts: names of tensors.
        asymmetric_bits: bits with which there may be zero points.
        runtimes: what reads it.
        mixed: every layer may have a scheme of its own.
        converts: a conversion can begin from it.
        tied_head: a quantized embedding that is the head too is stored under both names.
    """

    bits: tuple[int, ...]
    groups: tuple[Group, ...]
    methods: tuple[str, ...]
    layouts: tuple[str, ...]
    asymmetric_bits: tuple[int, ...] = ()
    runtimes: tuple[str, ...] = ("glmquant",)
    mixed: bool = False
    converts: bool = False
    tied_head: bool = False


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as a checkpoint states it: the name of its module, its scheme and its shape."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    role: Role = Role.LINEAR


class Format(Protocol):
    """A way to store quantized weights in safetensors.

    Attributes:
        name: as ``--format`` spells it.
        abilities: what it can hold.
        row_multiple: encoded row blocks must start at multiples of this.
    """

    name: str
    abilities: Abilities
    row_multiple: int

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` belongs to this format."""

    def check(self, recipe: Recipe, family: Family) -> None:
        """Raise `UsageError` for a combination that this format cannot hold beyond what `abilities` says."""

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """The schemes of embedding and head where `recipe` wants them quantized, given that of linear weights."""

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """What a user of such a checkpoint should know."""

    def scale_dtype(self, weight_dtype: str) -> str:
        """The dtype of scales for weights of a safetensors dtype."""

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """The stored tensors of the weight `name` (which ends in ``.weight``), the largest first."""

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Rows of a quantized weight as rows of its stored tensors (those without a constant)."""

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """The inverse of `encode`, for whole weights or any rows that `encode` could have been given."""

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """What ``config.json`` gains: `weights` are quantized, the linear modules `left` stay as they are."""

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """The quantized weights that a checkpoint with this ``config.json`` holds."""


def resolve_scheme(recipe: Recipe, abilities: Abilities, format_name: str, scale_dtype: str) -> Scheme:
    """The scheme for linear weights that `recipe` asks for and a format of these `abilities` can hold.

    Raises:
        UsageError: the format has no such thing; names the nearest that works.
    """
    if recipe.bits not in abilities.bits:
        raise UsageError(f"--format {format_name} holds {_either(abilities.bits)} bits, not {recipe.bits}.")
    group = abilities.groups[0] if recipe.group_size is None else recipe.group_size
    if group not in abilities.groups:
        raise UsageError(
            f"--format {format_name} has no group size {group}; use --group-size {_either(abilities.groups)}."
        )
    if not recipe.symmetric and recipe.bits not in abilities.asymmetric_bits:
        possible = "cannot be asymmetric"
        if abilities.asymmetric_bits:
            possible = f"can be asymmetric only with --bits {_either(abilities.asymmetric_bits)}"
        raise UsageError(f"--format {format_name} {possible}; use --symmetric.")
    return Scheme(
        bits=recipe.bits,
        group_size=None if group == ROW else int(group),
        symmetric=recipe.symmetric,
        scale_dtype=scale_dtype,  # type: ignore[arg-type]
    )


def _either(values: tuple[object, ...]) -> str:
    *most, last = (str(v) for v in values)
    return f"{', '.join(most)} or {last}" if most else last
