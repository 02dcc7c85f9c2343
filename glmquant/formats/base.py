"""What a file format is: names, dtypes and byte order of quantized weights, and nothing about how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint.sink import ShardLayout, StoredTensor
from ..errors import UsageError
from ..families import Role
from ..recipe import Group, Recipe
from ..scheme import QuantizedTensor, Scheme

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ..checkpoint.source import TensorSource
    from ..families import Dims, Family, LayoutTensor

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
        activations: bits to which activations may be rounded too, with a scale for each row of 8-bit weights.
        tied_head: a quantized embedding that is the head too is stored under both names.
    """

    bits: tuple[int, ...]
    groups: tuple[Group, ...]
    methods: tuple[str, ...]
    layouts: tuple[str, ...]
    asymmetric_bits: tuple[int, ...] = ()
    runtimes: tuple[str, ...] = ("glmquant",)
    mixed: bool = False
    activations: tuple[int, ...] = ()
    tied_head: bool = False


@dataclass(frozen=True)
class Rewritten:
    """A file that another program has put in the place of one that was written.

    Attributes:
        file: its name.
        nbytes: its size.
        sha256: its hash.
        tool: the program and, where it says so, its build, for the report.
        entries: what the report says of every weight that is not stored as it was, by name.
    """

    file: str
    nbytes: int
    sha256: str
    tool: str
    entries: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class LastStep:
    """What a format leaves to another program, once everything is written; both files are on the disk meanwhile.

    Attributes:
        label: for people.
        run: the folder and a number of threads -> what was done.
    """

    label: str
    run: Callable[[Path, int], Rewritten]


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as a checkpoint states it: the name of its module, its scheme and its shape."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    role: Role = Role.LINEAR


class Format(Protocol):
    """A way to store quantized weights.

    Attributes:
        name: as ``--format`` spells it.
        abilities: what it can hold.
    """

    name: str
    abilities: Abilities

    @property
    def row_multiple(self) -> int:
        """Encoded row blocks must start at multiples of this."""

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` belongs to this format."""

    def variant(self, config: Mapping[str, Any]) -> Format:
        """The variant of this format that a ``config.json`` which belongs to it states."""

    def chosen(self, recipe: Recipe) -> Format:
        """The variant that `recipe` asks for."""

    def check(self, recipe: Recipe, family: Family) -> None:
        """Raise `UsageError` for a combination that this format cannot hold beyond what `abilities` says."""

    def default_group(self, recipe: Recipe) -> Group:
        """Columns that share a scale where `recipe` does not say."""

    def linear_scheme(self, recipe: Recipe, weight_dtype: str) -> Scheme:
        """The scheme that `recipe` asks for, for linear weights of a safetensors dtype.

        Raises:
            UsageError: the format has no such thing; names the nearest that works.
        """

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """The schemes of embedding and head where `recipe` wants them quantized, given that of linear weights."""

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """What a user of such a checkpoint should know."""

    def scale_dtype(self, weight_dtype: str) -> str:
        """The dtype of scales for weights of a safetensors dtype."""

    def copied(self, tensor: LayoutTensor, dtype: str) -> StoredTensor | None:
        """How a tensor of `dtype` that is not quantized is stored; None if it is not."""

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """The stored tensors of the weight `name` (which ends in ``.weight``), the largest first."""

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Rows of a quantized weight as rows of its stored tensors (those without a constant)."""

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """The inverse of `encode`, for whole weights or any rows that `encode` could have been given.

        Raises:
            SourceError: `stored` is nothing that `encode` gives.
        """

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """What ``config.json`` gains: `weights` are quantized, the linear modules `left` stay as they are."""

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """The quantized weights that a checkpoint with this ``config.json`` holds."""

    def files(self, tensors: Sequence[Sequence[StoredTensor]], model: ModelFacts) -> tuple[ShardLayout, ...]:
        """The files that hold `tensors`; those of one weight come together and stay so."""

    def last_step(self, recipe: Recipe) -> LastStep | None:
        """What is left to do when the files are whole; None where that is nothing."""


@dataclass(frozen=True)
class ModelFacts:
    """What the layout of files may depend on.

    Attributes:
        family: of the model.
        dims: of the model.
        config: ``config.json`` of the source.
        folder: where the files beside its weights are, if they are here.
        recipe: with every choice made.
    """

    family: Family
    dims: Dims
    config: Mapping[str, Any]
    folder: Path
    recipe: Recipe


class FormatBase:
    """What most formats have in common."""

    name: str
    abilities: Abilities
    row_multiple = 1

    def variant(self, config: Mapping[str, Any]) -> Self:
        """See `Format`: there is one."""
        return self

    def chosen(self, recipe: Recipe) -> Self:
        """See `Format`: there is one."""
        return self

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""

    def default_group(self, recipe: Recipe) -> Group:
        """See `Format`."""
        return self.abilities.groups[0]

    def linear_scheme(self, recipe: Recipe, weight_dtype: str) -> Scheme:
        """See `Format`."""
        return resolve_scheme(recipe, self.abilities, self.name, self.scale_dtype(weight_dtype))

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """See `Format`."""
        return {}

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        return ()

    def scale_dtype(self, weight_dtype: str) -> str:
        """See `Format`."""
        return "float16"

    def copied(self, tensor: LayoutTensor, dtype: str) -> StoredTensor | None:
        """See `Format`: under its name and as it is."""
        return StoredTensor(tensor.name, dtype, tensor.shape)

    def files(self, tensors: Sequence[Sequence[StoredTensor]], model: ModelFacts) -> tuple[ShardLayout, ...]:
        """See `Format`: safetensors shards, filled in order."""
        return safetensors_shards(tensors, model.recipe.max_shard_size)

    def last_step(self, recipe: Recipe) -> LastStep | None:
        """See `Format`: nothing."""
        return None


def safetensors_shards(tensors: Sequence[Sequence[StoredTensor]], max_size: int) -> tuple[ShardLayout, ...]:
    """Fill shards in order; the tensors of one weight stay together."""
    empty = len(ShardLayout("", ()).header()) + 8  # padding of a header
    filled: list[list[StoredTensor]] = [[]]
    size = empty
    for together in tensors:
        # A line of the header holds the name, two offsets, the shape and some 60 characters of JSON.
        added = sum(tensor.nbytes + len(tensor.name) + 120 for tensor in together)
        if filled[-1] and size + added > max_size:
            filled.append([])
            size = empty
        filled[-1].extend(together)
        size += added
    if len(filled) == 1:
        return (ShardLayout("model.safetensors", tuple(filled[0])),)
    return tuple(
        ShardLayout(f"model-{n:05d}-of-{len(filled):05d}.safetensors", tuple(part))
        for n, part in enumerate(filled, 1)
    )


def refuse_quantizing(recipe: Recipe) -> None:
    """For recipes of 16 bits."""
    if recipe.group_size is not None or not recipe.symmetric or recipe.method is not None:
        raise UsageError("--bits 16 quantizes nothing; leave out --group-size, --asymmetric and --method.")
    refuse_quantized_ends(recipe, "--bits 16 quantizes nothing")


def refuse_quantized_ends(recipe: Recipe, what: str) -> None:
    """For formats in which embedding and head stay in 16 bit."""
    if recipe.quantize_head or recipe.quantize_embeddings:
        raise UsageError(f"{what}; leave out --quantize-head and --quantize-embeddings.")


def read_rows(
    source: TensorSource, fmt: Format, weight: StoredWeight, start: int, stop: int
) -> QuantizedTensor:
    """Rows ``start..stop`` of a quantized weight; `start` is a multiple of ``fmt.row_multiple``, and so is `stop`
    unless it is the end of the weight.

    Raises:
        SourceError: the stored tensors are nothing that the format has.
    """
    stored = {}
    for output in fmt.outputs(weight.name, weight.shape, weight.scheme):
        if output.constant is not None:
            continue
        if not output.per:
            stored[output.name] = source.read(output.name)
            continue
        first, last = start * output.spread // output.per, -(-stop * output.spread // output.per)
        if output.axis:
            stored[output.name] = source.read(output.name)[:, first:last]
        else:
            stored[output.name] = source.read(output.name, first, last)
    return fmt.decode(
        stored, StoredWeight(weight.name, weight.scheme, (stop - start, weight.shape[1]), weight.role)
    )


def blocks(fmt: Format, weight: StoredWeight, block_weights: int) -> Iterator[tuple[int, int]]:
    """Row blocks of about `block_weights` weights that `read_rows` takes, as (start, stop)."""
    rows, columns = weight.shape
    step = max(1, block_weights // columns)
    step = -(-step // fmt.row_multiple) * fmt.row_multiple
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


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
