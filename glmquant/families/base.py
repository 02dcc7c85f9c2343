"""What a model family is: a table of tensors and a few figures, no code that touches weights.

A `Family` answers, from ``config.json`` alone: which tensors must a checkpoint hold, with which shapes, which
of them are linear weights, and what are they called in transformers' native layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Any

from ..errors import SourceError

Config = Mapping[str, Any]

_MOST_LAYERS = 10_000  # each takes a few objects of every plan; the largest models have some hundred

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Role(str, Enum):
    """What a tensor is for; decides whether it is quantized."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    BUFFER = "buffer"  # stored by the original code and never read by it


@dataclass(frozen=True)
class Dims:
    """The sizes of a model, in elements.

    `heads` * `head_dim` need not equal `hidden`. `context` is the longest sequence the model was made for.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    qkv_bias: bool = True
    tied_head: bool = False

    def sizes(self) -> dict[str, int]:
        """The names that `TensorRule.shape` may use."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "vocab": self.vocab,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "ffn": self.ffn,
            "2ffn": 2 * self.ffn,
            # rotary frequencies: half of each head is rotated, in pairs
            "rotary": self.head_dim // 4,
        }


@dataclass(frozen=True)
class TensorRule:
    """One line of a family's table.

    Attributes:
        name: as the checkpoint stores it; ``{layer}`` stands for the layer number.
        shape: sizes by name, see `Dims.sizes`.
        role: what it is for.
        native: the tensors it becomes in the native layout, in row order, as (name, rows by name);
            empty where the native layout has no such tensor.
        when: a field of `Dims` that must be true for the tensor to exist.
        optional: a checkpoint may leave it out.
        unit: linear weights of a layer with the same name here have to be stored alike: engines fuse them.
        behind: the norm (its weight) whose output a linear weight multiplies; None if it is something else.
        fed: the linear weight whose last rows, so many by name, are the inputs of this one up to factors that do not
            depend on them; None if there is none.
    """

    name: str
    shape: tuple[str, ...]
    role: Role
    native: tuple[tuple[str, str], ...] = ()
    when: str | None = None
    optional: bool = False
    unit: str | None = None
    behind: str | None = None
    fed: tuple[str, str] | None = None


@dataclass(frozen=True)
class Part:
    """Rows ``start..stop`` of a source tensor, which the native layout stores under a name of its own."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorSpec:
    """A `TensorRule` for one layer of one model."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    native: tuple[Part, ...]
    optional: bool
    unit: str | None = None
    behind: str | None = None
    fed: tuple[str, int] | None = None


@dataclass(frozen=True)
class LinearUnit:
    """Linear weights of a layer that have to get the same scheme: one, or q, k and v of an attention.

    Attributes:
        name: for people.
        tensors: in row order; they multiply the same input.
        norm: the weight of the norm whose output that is; None if it is something else.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    norm: str | None


@dataclass(frozen=True)
class Fold:
    """Channels between two parts of a layer: what divides them in the giver and multiplies them in the takers changes
    nothing that the model computes.

    Attributes:
        layer: its number.
        giver: a norm's weight, or a linear one; its last rows, and those of its bias, are the channels.
        channels: how many.
        takers: linear weights, whose columns are the channels.
        repeat: heads that share the channels of one key/value head: so many blocks of columns for one of channels.
        block: channels of a head.
    """

    layer: int
    giver: TensorSpec
    channels: int
    takers: tuple[TensorSpec, ...]
    repeat: int = 1
    block: int = 1


@dataclass(frozen=True)
class LayoutTensor:
    """A tensor of an output layout: rows ``start..stop`` of the source tensor `source`."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    source: str
    start: int
    stop: int
    optional: bool


@dataclass(frozen=True)
class Family:
    """A model family, as data.

    Attributes:
        name: key by which recipes, reports and tests know it.
        rules: the table of tensors; rules with ``{layer}`` apply to every layer.
        layouts: output layouts that exist for it, the default first.
        read_dims: sizes from a config; raises KeyError for an absent field.
        describe: the published model that a config looks like, for people.
        native_config: ``config.json`` of the native layout, without the quantization part; None if there is none.
        unsupported: switches of the original code that no published model sets, with the only value known here.
        original_config: what ``config.json`` of the original layout says whatever the source said.
        stop_ids: where the original ``chat()`` ends an answer, from a config; the flag says that the tokenizer may have
            role tokens.
        folds_norms: only linear weights see what norms give.
    """

    name: str
    rules: tuple[TensorRule, ...]
    layouts: tuple[str, ...]
    read_dims: Callable[[Config], Dims]
    describe: Callable[[Config], str]
    native_config: Callable[[Config], dict[str, Any]] | None = None
    unsupported: Mapping[str, Any] | None = None
    original_config: Callable[[Config], dict[str, Any]] = lambda config: {}
    stop_ids: Callable[[Config, bool], Any] = lambda config, has_roles: config.get("eos_token_id")
    folds_norms: bool = True

    def dims(self, config: Config) -> Dims:
        """Sizes of the model; `SourceError` names what config.json lacks or states wrongly."""
        for key, expected in (self.unsupported or {}).items():
            if key in config and config[key] != expected:
                raise SourceError(
                    f"config.json sets {key} to {config[key]!r}, a variant of {self.name} that no published "
                    f"model uses and glmquant does not know (only {expected!r})."
                )
        for key in ("layernorm_epsilon", "rms_norm_eps", "rope_ratio"):
            number = config.get(key, 1)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
                raise SourceError(f"config.json gives {key} as {number!r}; it must be a positive number.")
        stated_dtype(config)
        try:
            dims = self.read_dims(config)
            if self.native_config is not None:
                self.native_config(config)  # what it lacks is to be known before a weight is read
        except KeyError as error:
            raise SourceError(f"config.json of this {self.name} model lacks {error}.") from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise SourceError(f"config.json of this {self.name} model has a bad value: {error}.") from None
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"):
            value = getattr(dims, field)
            if type(value) is not int or value <= 0:  # a bool is an int too
                raise SourceError(f"config.json gives {field} as {value!r}; it must be a positive number.")
        if dims.layers > _MOST_LAYERS:
            raise SourceError(
                f"config.json gives {dims.layers} layers, more than any model has; download the file again."
            )
        if dims.heads % dims.kv_heads:
            raise SourceError(
                f"config.json gives {dims.heads} attention heads, which cannot share {dims.kv_heads} key/value "
                "heads evenly."
            )
        return dims

    def tensors(self, dims: Dims) -> Iterator[TensorSpec]:
        """Every tensor of the model, in the order in which data flows through it."""
        sizes = dims.sizes()
        before = [r for r in self.rules if r.role is Role.EMBEDDING]
        layered = [r for r in self.rules if "{layer}" in r.name]
        after = [r for r in self.rules if r not in before and r not in layered]
        for rule in before:
            yield from self._expand(rule, dims, sizes, None)
        for layer in range(dims.layers):
            for rule in layered:
                yield from self._expand(rule, dims, sizes, layer)
        for rule in after:
            yield from self._expand(rule, dims, sizes, None)

    def units(self, dims: Dims) -> Iterator[LinearUnit]:
        """The linear weights of all layers, in the order of `tensors`, together where they have to be alike."""
        linear = (spec for spec in self.tensors(dims) if spec.role is Role.LINEAR)
        for (layer, unit), specs in groupby(linear, key=lambda spec: (spec.layer, spec.unit or spec.name)):
            tensors = tuple(specs)
            own = tensors[0].name.removesuffix(".weight").rpartition(".")[2]
            name = own if tensors[0].unit is None else unit
            yield LinearUnit(f"layer {layer} {name}", tensors, tensors[0].behind)

    def folds(self, dims: Dims) -> Iterator[Fold]:
        """Where channels can be scaled, in the order of `tensors`; in each layer the same."""
        by_name = {spec.name: spec for spec in self.tensors(dims)}
        for unit in self.units(dims):
            first = unit.tensors[0]
            assert first.layer is not None
            if unit.norm is not None and self.folds_norms:
                yield Fold(first.layer, by_name[unit.norm], first.shape[1], unit.tensors)
            elif first.fed is not None:
                giver, rows = first.fed
                repeat = first.shape[1] // rows
                block = dims.head_dim if repeat > 1 else 1
                yield Fold(first.layer, by_name[giver], rows, unit.tensors, repeat, block)

    def in_layout(self, dims: Dims, layout: str) -> Iterator[LayoutTensor]:
        """Every tensor of an output layout, ``native`` or ``original``, in the order of `tensors`."""
        for spec in self.tensors(dims):
            whole = (Part(spec.name, 0, spec.shape[0]),)
            for part in spec.native if layout == "native" else whole:
                yield LayoutTensor(
                    name=part.name,
                    shape=(part.stop - part.start, *spec.shape[1:]),
                    role=spec.role,
                    layer=spec.layer,
                    source=spec.name,
                    start=part.start,
                    stop=part.stop,
                    optional=spec.optional,
                )

    def layout_of(self, config: Config) -> str:
        """The layout of a checkpoint with this ``config.json``."""
        return "original" if config.get("model_type") == "chatglm" else "native"

    @staticmethod
    def _expand(
        rule: TensorRule, dims: Dims, sizes: Mapping[str, int], layer: int | None
    ) -> Iterator[TensorSpec]:
        if rule.when is not None and not getattr(dims, rule.when):
            return
        parts, start = [], 0
        for name, rows in rule.native:
            parts.append(Part(name.format(layer=layer), start, start + sizes[rows]))
            start += sizes[rows]
        yield TensorSpec(
            name=rule.name.format(layer=layer),
            shape=tuple(sizes[s] for s in rule.shape),
            role=rule.role,
            layer=layer,
            native=tuple(parts),
            optional=rule.optional or (rule.role is Role.HEAD and dims.tied_head),
            unit=rule.unit,
            behind=rule.behind.format(layer=layer) if rule.behind else None,
            fed=(rule.fed[0].format(layer=layer), sizes[rule.fed[1]]) if rule.fed else None,
        )


def stated_dtype(config: Config) -> str:
    """The dtype a model is run in, as safetensors spells it; half where config.json is silent, as all THUDM
    models were.

    Raises:
        SourceError: config.json states something else than float16, bfloat16 or float32.
    """
    key = "dtype" if config.get("dtype") else "torch_dtype"
    stated = config.get(key) or "float16"
    dtype = _DTYPES.get(str(stated).removeprefix("torch."))
    if dtype is None:
        raise SourceError(
            f"config.json gives {key} as {stated!r}; a model is run in float16, bfloat16 or float32."
        )
    return dtype


def per_layer(prefix: str, rows: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """Put `prefix` (with ``{layer}``) in front of every rule's name, of the norm it is behind and of what feeds it."""
    return tuple(
        replace(
            r,
            name=prefix + r.name,
            behind=prefix + r.behind if r.behind else None,
            fed=(prefix + r.fed[0], r.fed[1]) if r.fed else None,
        )
        for r in rows
    )
