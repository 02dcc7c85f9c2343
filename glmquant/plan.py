"""What will be done, decided and checked before a weight is read.

`make_plan` turns a source, its family, a recipe and a format into a `Plan`: ordered stages of items, each of
which says which rows of which source tensor become which stored tensors, with every size known. Everything that
can be refused is refused here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from . import families, formats
from .checkpoint.decoded import stored_scheme
from .checkpoint.sink import ShardLayout, StoredTensor
from .checkpoint.source import ITEM_SIZES, TensorInfo, TensorSource
from .errors import SourceError, UsageError
from .families import Dims, Family, LayoutTensor, Role
from .formats import Format, ModelFacts
from .recipe import CALIBRATED, SCALED, Calibration, Recipe
from .scheme import Scheme

_WEIGHT_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Item:
    """One tensor to produce.

    Attributes:
        name: in the output layout; for a quantized weight the name it would have had (``....weight``).
        source: the source tensor, of which rows ``start..stop`` are used.
        shape: of those rows.
        dtype: of the source, as safetensors spells it.
        scheme: how to quantize; None copies.
        outputs: the stored tensors.
        decoded: how the source tensor is quantized already; None if it is not.
    """

    name: str
    role: Role
    layer: int | None
    source: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str
    scheme: Scheme | None
    outputs: tuple[StoredTensor, ...]
    decoded: Scheme | None = None

    @property
    def carried(self) -> bool:
        """Whether codes of the source are kept, because the grid of `scheme` holds theirs."""
        return self.scheme is not None and self.decoded is not None and self.scheme.holds(self.decoded)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read."""
        size = ITEM_SIZES[self.dtype]
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class Stage:
    """Items that are worked on together: the tensors of one transformer block, or of one end of the model."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. `recipe` has every choice filled in."""

    family: str
    model: str
    dims: Dims
    recipe: Recipe
    stages: tuple[Stage, ...]
    shards: tuple[ShardLayout, ...]
    notes: tuple[str, ...]

    @property
    def items(self) -> Iterator[Item]:
        """All items in order."""
        for stage in self.stages:
            yield from stage.items

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def source_nbytes(self) -> int:
        """Bytes of weights that are read."""
        return sum(item.source_nbytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "model": self.model,
            "family": self.family,
            "recipe": self.recipe.to_json(),
            "source_bytes": self.source_nbytes,
            "bytes": self.nbytes,
            "files": {shard.file: shard.nbytes for shard in self.shards},
            "notes": list(self.notes),
            "stages": [
                {
                    "name": stage.name,
                    "items": [
                        {
                            "name": item.name,
                            "source": [item.source, item.start, item.stop],
                            "shape": list(item.shape),
                            "dtype": item.dtype,
                            "scheme": item.scheme.to_json() if item.scheme else None,
                            **({"decoded_from": item.decoded.to_json()} if item.decoded else {}),
                            **({"codes": "carried over"} if item.carried else {}),
                            "bytes": item.nbytes,
                        }
                        for item in stage.items
                    ],
                }
                for stage in self.stages
            ],
        }

    def digest(self, *extra: str) -> str:
        """Identifies the plan and whatever else decides the bytes."""
        text = json.dumps([self.to_json(), *extra], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def resolve_recipe(recipe: Recipe, family: Family) -> tuple[Recipe, Format]:
    """Fill in what the recipe leaves open and refuse what does not go together.

    Raises:
        UsageError: naming the nearest combination that works.
    """
    name = recipe.format or ("safetensors" if recipe.bits == 16 else _default_format(family))
    fmt = formats.get(name).chosen(recipe)
    if recipe.gptq_version is not None and name != "gptq":
        raise UsageError(f"--gptq-version goes with --format gptq, not {name}; leave out --gptq-version.")
    if recipe.double_quant and name != "bitsandbytes":
        raise UsageError(
            f"--double-quant goes with --format bitsandbytes, not {name}; leave out --double-quant."
        )
    if recipe.k_quant is not None and (name != "gguf" or recipe.bits != 16):
        raise UsageError(
            f"a K-quant ({recipe.k_quant}) is made of a GGUF file in 16 bit; use --format gguf with --bits 16."
        )
    if recipe.activations is not None and name != "compressed-tensors":
        raise UsageError(f"--bits w8a8 goes with --format compressed-tensors, not {name}.")
    if recipe.bits == 16 and 16 not in fmt.abilities.bits:
        raise UsageError(f"--bits 16 goes with --format safetensors or gguf, not {name}.")
    if recipe.bits != 16 and name == "safetensors":
        raise UsageError(
            f"--format safetensors holds 16 bit only; for --bits {recipe.bits} use --format {_default_format(family)}."
        )
    fmt.check(recipe, family)
    possible = [layout for layout in fmt.abilities.layouts if layout in family.layouts]
    if not possible:
        raise UsageError(
            f"--format {name} needs the {fmt.abilities.layouts[0]} layout, which a {family.name} checkpoint "
            f"does not have; use --format compressed-tensors."
        )
    layout = recipe.layout or possible[0]
    if layout not in possible:
        raise UsageError(
            f"--layout {layout} is not possible for a {family.name} model in --format {name}; "
            f"use --layout {possible[0]}."
        )
    method = recipe.method
    if recipe.bits != 16:
        method = method or fmt.abilities.methods[0]
        if method not in fmt.abilities.methods:
            from . import quantizers  # loads torch, which planning has no other use for

            quantizers.get(method)
            raise UsageError(
                f"--method {method} does not go with --format {name}; use --method {fmt.abilities.methods[0]}."
            )
    group = recipe.group_size
    if group is None and recipe.bits != 16:
        group = fmt.default_group(recipe)
    if method == "thudm" and (group != "row" or not recipe.symmetric):
        raise UsageError("--method thudm is per row and symmetric; use --method mse or rtn for groups.")
    if method == "hqq" and recipe.symmetric:
        raise UsageError(
            "--method hqq chooses zero points, and without --asymmetric there are none; use --method mse."
        )
    if method in SCALED and not family.folds_norms:
        raise UsageError(
            f"--method {method} folds scales into norms, whose output a {family.name} model also adds to its residual "
            "stream; use --method gptq."
        )
    calibration = recipe.calibration
    if method in CALIBRATED:
        calibration = calibration or Calibration()
    elif calibration is not None:
        raise UsageError(
            f"--calibration does nothing for --method {method}; use --method {' or '.join(CALIBRATED)}."
        )
    resolved = replace(
        recipe, group_size=group, method=method, format=name, layout=layout, calibration=calibration
    )
    return resolved, fmt


def _default_format(family: Family) -> str:
    # Engines read compressed-tensors only of models they have a class for.
    return "compressed-tensors" if "native" in family.layouts else "cpm"


def make_plan(source: TensorSource, recipe: Recipe) -> Plan:
    """Plan the conversion of `source`.

    Raises:
        UsageError: the recipe asks for something that does not exist or does not fit the model's widths.
        SourceError: the checkpoint is not a whole model of a known family.
    """
    family = families.detect(source.config)
    dims = family.dims(source.config)
    recipe, fmt = resolve_recipe(recipe, family)
    infos = check_source(source, family, dims)
    narrow = families.stated_dtype(source.config)
    items = []
    for tensor in _tensors(family, dims, infos, recipe):
        decoded = stored_scheme(source, tensor.source)
        item = _item(tensor, infos[tensor.source], narrow, recipe, fmt, decoded)
        items += [item] if item is not None else []
    model = ModelFacts(family, dims, source.config, source.folder, recipe)
    return Plan(
        family=family.name,
        model=family.describe(source.config),
        dims=dims,
        recipe=recipe,
        stages=tuple(_stages(items)),
        shards=fmt.files([item.outputs for item in items], model),
        notes=(
            *fmt.notes(recipe),
            *(recipe.fit.notes() if recipe.fit else ()),
            *_losses(items),
            *_decoded(infos),
        ),
    )


def _tensors(
    family: Family, dims: Dims, infos: Mapping[str, TensorInfo], recipe: Recipe
) -> Iterator[LayoutTensor]:
    """The tensors to write. A head that is tied to the embedding may be absent from the source."""
    embedding = ""
    tied_head = formats.get(str(recipe.format)).abilities.tied_head
    for tensor in family.in_layout(dims, str(recipe.layout)):
        if tensor.role is Role.EMBEDDING:
            embedding = tensor.source
        if tensor.source in infos:
            yield tensor
        elif tensor.role is Role.HEAD and tied_head and recipe.quantize_embeddings:
            yield replace(tensor, source=embedding)
        elif tensor.role is Role.HEAD and (recipe.quantize_head or recipe.quantize_embeddings):
            raise UsageError(
                "this model has no output head of its own, it uses the embedding; "
                "leave out --quantize-head and --quantize-embeddings."
            )


def check_source(source: TensorSource, family: Family, dims: Dims) -> dict[str, TensorInfo]:
    """The tensors of a whole model, or a `SourceError` that names what is missing, foreign or misshapen."""
    # The config is asked first: the folder that P-tuning leaves holds nothing but the prefix.
    stated = any(source.config.get(key) for key in ("pre_seq_len", "prefix_projection"))
    if stated or any(".prefix_encoder." in name for name in source.infos()):
        raise SourceError(
            f"{source.folder} holds a P-tuning prefix (pre_seq_len or prefix_projection in config.json, or a "
            "prefix_encoder), which has no quantized form and no place in the native layout; convert the base model "
            "without it and keep the prefix beside it."
        )
    infos = dict(source.infos())
    if dims.layers > len(infos):
        raise SourceError(
            f"{source.folder} holds {len(infos)} tensors, config.json gives {dims.layers} layers. "
            "Are weights and config.json of one model?"
        )
    missing, expected = [], set()
    for spec in family.tensors(dims):
        expected.add(spec.name)
        info = infos.get(spec.name)
        if info is None:
            if not spec.optional:
                missing.append(spec.name)
            continue
        if info.shape != spec.shape:
            raise SourceError(
                f"{spec.name} in {info.shard} has shape {list(info.shape)}; config.json calls for "
                f"{list(spec.shape)}. The weights and config.json do not belong together."
            )
        if info.dtype not in _WEIGHT_DTYPES:
            raise SourceError(
                f"{spec.name} in {info.shard} is stored as {info.dtype}; expected {', '.join(_WEIGHT_DTYPES)}. "
                "Is it a quantized checkpoint whose config.json does not say so?"
            )
    if missing:
        raise SourceError(
            f"{source.folder} is not a whole {family.name} model: it lacks {_and_more(missing)}; download it again."
        )
    foreign = sorted(set(infos) - expected)
    if foreign:
        raise SourceError(
            f"{source.folder} holds {_and_more(foreign)}, unknown in a {family.name} model of {dims.layers} layers "
            "(config.json). Are weights and config.json of one model?"
        )
    return infos


def _and_more(names: list[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more tensor{'s'[: more > 1]}" if more else "")


def _losses(items: list[Item]) -> Iterator[str]:
    """What happens to weights that are quantized already."""
    ways: dict[str, Counter[str]] = {}
    for item in items:
        if item.decoded is not None:
            how = "again" if item.scheme else "decoded"
            if item.carried and item.scheme is not None:
                how = "carried" if item.scheme.keeps_scales(item.decoded) else "rounded"
            ways.setdefault(how, Counter())[
                f"{item.decoded}" + (f" to {item.scheme}" if item.scheme else "")
            ] += 1
    texts = {
        "carried": "keep the codes they have; nothing is lost",
        "rounded": "keep the codes they have, and their scales are rounded to another dtype",
        "again": "are decoded and quantized again, which loses more than quantizing the 16-bit original",
        "decoded": "are decoded to 16 bit, which does not bring back what their quantization lost",
    }
    for how, text in texts.items():
        if how in ways:
            counts = ", ".join(f"{count} weights ({what})" for what, count in sorted(ways[how].items()))
            yield f"the source is quantized: {counts} {text}."


def _decoded(infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What is read of a source that another program has quantized, in ways that have no scheme here."""
    counts = Counter(info.decoded for info in infos.values() if info.decoded)
    if counts:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
        yield (
            f"the source is quantized by llama.cpp: {counts.total()} weights ({kinds}) are decoded, and what their "
            "quantization lost does not come back."
        )


def _item(
    tensor: LayoutTensor, info: TensorInfo, narrow: str, recipe: Recipe, fmt: Format, decoded: Scheme | None
) -> Item | None:
    # ChatGLM-6B stores some norms, and fine-tunes everything, in float32, wider than they are run in.
    dtype = narrow if info.dtype == "F32" else info.dtype
    scheme = _scheme(tensor, dtype, recipe, fmt)
    if scheme is None:
        copied = fmt.copied(tensor, dtype)
        if copied is None:
            return None
        outputs: tuple[StoredTensor, ...] = (copied,)
    else:
        outputs = fmt.outputs(tensor.name, (tensor.shape[0], tensor.shape[1]), scheme)
    return Item(
        tensor.name, tensor.role, tensor.layer, tensor.source, tensor.start, tensor.stop,
        tensor.shape, info.dtype, scheme, outputs, decoded,
    )  # fmt: skip


def _scheme(tensor: LayoutTensor, dtype: str, recipe: Recipe, fmt: Format) -> Scheme | None:
    if recipe.bits == 16:
        return None
    linear = fmt.linear_scheme(recipe, dtype)
    choice = recipe.fit.of(tensor.source) if recipe.fit else None
    if choice is not None and choice.bits == 16:
        return None
    if choice is not None:
        scheme: Scheme | None = replace(
            linear, bits=choice.bits, group_size=None if choice.group_size == "row" else choice.group_size
        )
    elif tensor.role is Role.LINEAR:
        scheme = linear
    else:
        scheme = fmt.end_schemes(recipe, linear).get(tensor.role)
    if scheme is not None:
        scheme.check_width(tensor.name, tensor.shape[1])
    return scheme


def _stages(items: list[Item]) -> Iterator[Stage]:
    first, last = 0, 0
    while first < len(items):
        while last < len(items) and items[last].layer == items[first].layer:
            last += 1
        layer = items[first].layer
        name = f"layer {layer}" if layer is not None else ("input" if first == 0 else "output")
        yield Stage(name, tuple(items[first:last]))
        first = last
