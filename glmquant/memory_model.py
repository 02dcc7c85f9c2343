"""What of a checkpoint, or of a plan for one, decides how much memory it takes: `Model`, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from . import families, formats
from .checkpoint.source import ITEM_SIZES, TensorSource
from .errors import SourceError
from .families import Dims, Role
from .plan import Plan
from .scheme import Scheme

Place = Literal["cuda", "cpu"]
_CHUNK = 64  # columns; see glmquant/ops/interleaved.py
_DOUBLE = 256  # scales that share a scale of their own, with double quantization


@dataclass(frozen=True)
class Held:
    """A tensor of a model in memory: `scheme` is None for one that is not quantized."""

    role: Role
    shape: tuple[int, ...]
    scheme: Scheme | None


@dataclass(frozen=True)
class Model:
    """What of a checkpoint decides its memory.

    Attributes:
        family: key of its family.
        dims: sizes of the model.
        dtype: what it computes in, as safetensors spells it.
        held: its tensors, buffers and tied heads left out.
        file_bytes: its weight files.
    """

    family: str
    dims: Dims
    dtype: str
    held: tuple[Held, ...]
    file_bytes: int

    @classmethod
    def of_plan(cls, plan: Plan, dtype: str) -> Model:
        """The model that a plan would write; `dtype` is `families.stated_dtype` of its source."""
        items = ((item.role, item.shape, item.scheme) for item in plan.items)
        return cls(plan.family, plan.dims, dtype, _held(items, plan.dims), plan.nbytes)

    @classmethod
    def of_checkpoint(cls, source: TensorSource) -> Model:
        """The model in a folder, from its headers.

        Raises:
            SourceError: it is no whole model of a known family.
        """
        family = families.detect(source.config)
        dims = family.dims(source.config)
        stored_as = formats.detect(source.config)
        quantized = {w.name: w.scheme for w in stored_as.quantized(source.config, family, dims)}
        stored, items, missing = source.infos(), [], []
        for tensor in family.in_layout(dims, family.layout_of(source.config)):
            scheme = quantized.get(tensor.name)
            if scheme is not None:
                shape = (tensor.shape[0], tensor.shape[1])
                parts = [t.name for t in stored_as.outputs(tensor.name, shape, scheme)]
            else:
                parts = [tensor.name]
            lacking = [name for name in parts if name not in stored]
            if not lacking:
                items.append((tensor.role, tensor.shape, scheme))
            elif not tensor.optional:
                missing += lacking
        if missing:
            raise SourceError(
                f"{source.folder} is not a whole {family.name} model: it lacks {missing[0]}; download it again."
            )
        size = sum(path.stat().st_size for path in source.files)
        return cls(family.name, dims, families.stated_dtype(source.config), _held(items, dims), size)

    @cached_property
    def weights(self) -> int:
        """How many weights there are, quantized ones counted once."""
        return sum(math.prod(held.shape) for held in self.held)

    def unpacked(self) -> Model:
        """The same with every weight in what it computes in."""
        return replace(self, held=tuple(replace(held, scheme=None) for held in self.held))


def _held(items: Iterable[tuple[Role, tuple[int, ...], Scheme | None]], dims: Dims) -> tuple[Held, ...]:
    unused = {Role.BUFFER, Role.HEAD} if dims.tied_head else {Role.BUFFER}
    return tuple(Held(*item) for item in items if item[0] not in unused)


def interleaved(held: Held, device: Place) -> bool:
    """Whether a linear layer's weight lies in the order of the GPU's kernels there (`glmquant.ops.interleaved`).

    As on a GPU on which Triton works. Embeddings are left as they are.
    """
    scheme = held.scheme
    if device == "cpu" or scheme is None or scheme.levels is not None or held.role is Role.EMBEDDING:
        return False
    rows, columns = held.shape
    width = columns // scheme.groups(columns)
    return rows % 2 == 0 and (width == columns or width == _CHUNK // 2 or width % _CHUNK == 0)


def held_bytes(held: Held, dtype: str, device: Place) -> tuple[int, int, int]:
    """Packed codes, scales with zero points, and unquantized bytes of a tensor in a model that computes in `dtype`.

    As `glmquant.models.quantized` holds it: words of 32 bits, scales as stored, zero points of one byte; where it is
    `interleaved`, whole chunks of 64 columns and zero points of two bytes.
    """
    if held.scheme is None:
        return 0, 0, math.prod(held.shape) * ITEM_SIZES[dtype]
    rows, columns = held.shape
    ordered = interleaved(held, device)
    words = -(-columns // _CHUNK) * 2 * held.scheme.bits if ordered else -(-columns * held.scheme.bits // 32)
    scale = 4 if held.scheme.scale_dtype == "float32" else 2
    offset = 0 if held.scheme.symmetric else scale if held.scheme.minimum else 2 if ordered else 1
    return 4 * rows * words, rows * held.scheme.groups(columns) * (scale + offset), 0


def bitsandbytes_bytes(held: Held, dtype: str) -> tuple[int, int, int]:
    """`held_bytes` where the library bitsandbytes holds it: quantized scales stay so."""
    weights, scales, rest = held_bytes(held, dtype, "cpu")
    if held.scheme is not None and held.scheme.double:
        count = held.shape[0] * held.scheme.groups(held.shape[1])
        scales = count + -(-count // _DOUBLE) * 4 + 4 * 256
    return weights, scales, rest
