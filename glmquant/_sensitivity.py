"""How much each linear layer suffers under each scheme, measured once and kept: `measure`.

Data-free. The damage of a scheme is the relative squared error of the layer's *output*, ``E|(W - W')x|^2 / E|Wx|^2``,
for inputs whose channels are uncorrelated. Then it is ``sum_j s_j |w_j - w'_j|^2 / sum_j s_j |w_j|^2`` over the columns
j of the weight, s_j being the mean square of channel j. Behind a norm, s_j is the square of its gain (and of its bias):
normalized values have mean square 1. Elsewhere nothing is known without data, and s_j is 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import families
from ._folders import cache_folder
from ._open import OpenedSource, PathLike, open_source
from ._workers import cores, tuned_for_blocks
from .checkpoint.source import TORCH_NAMES, TensorSource
from .errors import QuantizationError
from .families import Role, TensorSpec
from .formats.base import ROW
from .recipe import Group
from .scheme import Scheme

if TYPE_CHECKING:
    import torch

    from .quantizers import Quantizer

# Bits and groups that `--fit` chooses from, the smallest file first. Finer groups than these in 8 bit change nothing.
CANDIDATES: tuple[tuple[int, Group], ...] = ((4, ROW), (4, 128), (4, 64), (4, 32), (8, 128), (8, ROW))
_ROWS = 256  # of a weight that are looked at, in evenly spaced blocks
_BLOCK_ROWS = 8
_VERSION = "1"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Unit:
    """Source tensors that have to get the same scheme: a linear layer, or q, k and v of one attention.

    Attributes:
        name: for people.
        tensors: their names in the source.
        shape: rows together, columns.
        damage: by (bits, group); candidates whose groups do not divide the columns are left out.
    """

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]
    damage: dict[tuple[int, Group], float]


@dataclass(frozen=True)
class Measurement:
    """What `measure` found; `method` is the quantizer that it was found with."""

    method: str
    units: tuple[Unit, ...]

    def relative_error(self, bits: int, group: Group) -> float | None:
        """Relative output error of one scheme for all layers: the root of the mean damage; None if not measured."""
        found = [unit.damage.get((bits, group)) for unit in self.units]
        known = [damage for damage in found if damage is not None]
        return (sum(known) / len(known)) ** 0.5 if known and len(known) == len(found) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        units = [
            {"name": u.name, "tensors": u.tensors, "shape": u.shape, "damage": [[*k, d] for k, d in u.damage.items()]}
            for u in self.units
        ]  # fmt: skip
        return {"method": self.method, "units": units}

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """The inverse of `to_json`."""
        units = tuple(
            Unit(u["name"], tuple(u["tensors"]), tuple(u["shape"]), {(b, g): d for b, g, d in u["damage"]})
            for u in data["units"]
        )
        return cls(data["method"], units)


def measure(source: PathLike, method: str = "mse", *, progress: Progress | None = None) -> Measurement:
    """Measure how much every linear layer of `source` suffers under every candidate scheme; see the module.

    Looks at 256 evenly spaced rows of each weight. The result is kept in the user's cache folder and found again
    as long as the files do not change.

    Raises:
        SourceError: see `glmquant.convert`.
        QuantizationError: a weight holds NaN or infinity.
    """
    return measure_opened(open_source(source), method, progress)


def measure_opened(opened: OpenedSource, method: str, progress: Progress | None = None) -> Measurement:
    """See `measure`."""
    kept = _kept_at(opened, method)
    found = _read(kept)
    if found is None:
        found = Measurement(method, tuple(_measured(opened.source, method, progress)))
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(found.to_json()))
        fresh.replace(kept)  # whole or not at all
    return found


def saved_measurement(opened: OpenedSource, method: str = "mse") -> Measurement | None:
    """What an earlier `measure` found, or None."""
    return _read(_kept_at(opened, method))


def _kept_at(opened: OpenedSource, method: str) -> Path:
    state: list[tuple[object, ...]] = [
        (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in opened.source.files
    ]
    config = json.dumps(opened.source.config, sort_keys=True)
    state += [(name, file["bytes"], file["sha256"]) for name, file in opened.remote_files.items()]
    key = repr((_VERSION, _ROWS, CANDIDATES, method, state, config))
    return cache_folder("measured") / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(path: Path) -> Measurement | None:
    try:
        return Measurement.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or damaged: it is measured again


def units_of(source: TensorSource) -> Iterator[tuple[str, list[TensorSpec], str | None]]:
    """Name, tensors, and the norm in front of them, of everything that has to have one scheme."""
    family = families.detect(source.config)
    qkv: list[TensorSpec] = []
    norm: str | None = None
    for spec in family.tensors(family.dims(source.config)):
        if spec.name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            norm = spec.name
        if spec.role is not Role.LINEAR:
            continue
        module = spec.name.removesuffix(".weight").rpartition(".")[2]
        if module in ("q_proj", "k_proj", "v_proj"):
            qkv.append(spec)
            if len(qkv) < 3:
                continue
            specs, module, qkv = qkv, "qkv", []
        else:
            specs = [spec]
        yield f"layer {spec.layer} {module}", specs, norm
        norm = None


def _measured(source: TensorSource, method: str, progress: Progress | None) -> Iterator[Unit]:
    from . import quantizers

    quantizer = quantizers.get(method)
    scale = TORCH_NAMES[families.stated_dtype(source.config)]
    todo = list(units_of(source))
    with tuned_for_blocks(), ThreadPoolExecutor(cores(), thread_name_prefix="glmquant-measure") as pool:
        for number, unit in enumerate(pool.map(lambda t: _measured_unit(source, quantizer, scale, *t), todo)):
            yield unit
            if progress is not None:
                progress(number + 1, len(todo), unit.name)
    for shard in {info.shard for info in source.infos().values()}:
        source.release(shard)


def _measured_unit(
    source: TensorSource,
    quantizer: Quantizer,
    scale: str,
    name: str,
    specs: list[TensorSpec],
    norm: str | None,
) -> Unit:
    import torch

    columns = specs[0].shape[1]
    channels = _mean_squares(source, norm, columns)
    error: dict[tuple[int, Group], float] = {}
    total = 0.0
    for spec in specs:
        rows = _sample(source, spec)
        weight = rows.float()
        share = spec.shape[0] / len(rows)
        total += share * float((weight.square().sum(0, dtype=torch.float64) * channels).sum())
        for bits, group in CANDIDATES:
            if group != ROW and columns % int(group):
                continue
            scheme = Scheme(bits, None if group == ROW else int(group), scale_dtype=scale)  # type: ignore[arg-type]
            try:
                lost = (quantizer(rows, scheme).dequantize() - weight).square_().sum(0, dtype=torch.float64)
            except QuantizationError as problem:
                raise QuantizationError(f"{spec.name} cannot be converted: {problem}.") from None
            error[bits, group] = error.get((bits, group), 0.0) + share * float((lost * channels).sum())
    damage = {key: lost / total if total else 0.0 for key, lost in error.items()}
    return Unit(name, tuple(spec.name for spec in specs), (sum(s.shape[0] for s in specs), columns), damage)


def _mean_squares(source: TensorSource, norm: str | None, columns: int) -> torch.Tensor:
    """Mean square of every input channel, float64 [columns]."""
    import torch

    if norm is None:
        return torch.ones(columns, dtype=torch.float64)
    squares = source.read(norm).double().square()
    bias = norm.removesuffix("weight") + "bias"
    if bias in source.infos():  # ChatGLM-6B
        squares = squares + source.read(bias).double().square()
    return squares


def _sample(source: TensorSource, spec: TensorSpec) -> torch.Tensor:
    """Evenly spaced blocks of rows, `_ROWS` in all; every row of a smaller weight."""
    import torch

    rows = spec.shape[0]
    if rows <= _ROWS:
        return source.read(spec.name)
    count = _ROWS // _BLOCK_ROWS
    starts: Sequence[int] = [i * (rows - _BLOCK_ROWS) // (count - 1) for i in range(count)]
    return torch.cat([source.read(spec.name, start, start + _BLOCK_ROWS) for start in starts])
