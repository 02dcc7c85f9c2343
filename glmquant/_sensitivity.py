"""How much each linear layer suffers under each scheme, measured once and kept: `measure`.

Data-free, unless the method is a calibrated one. The damage of a scheme is the relative squared error of the layer's
*output*, ``E|(W - W')x|^2 / E|Wx|^2``, for inputs whose channels are uncorrelated. Then it is
``sum_j s_j |w_j - w'_j|^2 / sum_j s_j |w_j|^2`` over the columns j of the weight, s_j being the mean square of channel
j. Behind a norm, s_j is the square of its gain (and of its bias): normalized values have mean square 1. Elsewhere
nothing is known without data, and s_j is 1. For calibrated methods s_j is what the text makes it, in the model as it
is; the errors are those of `mse`, which such methods lower about evenly. The text also tells what an error of each
layer costs in the end (`Unit.importance`), by which layers are weighed against each other: without it they all count
the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import families, formats
from ._folders import cache_folder
from ._open import OpenedSource, PathLike, open_source
from ._windows import CALIBRATION_SAMPLE, read_text
from ._workers import cores, tuned_for_blocks
from .checkpoint.source import TORCH_NAMES, TensorSource
from .errors import QuantizationError, SourceError, UsageError
from .families import LinearUnit, TensorSpec
from .formats.base import ROW
from .recipe import CALIBRATED, RANDOM, Calibration, Group, Recipe
from .scheme import Scheme

if TYPE_CHECKING:
    import torch

    from .calibration import LayerFacts
    from .quantizers import Quantizer

_ROWS = 256  # of a weight that are looked at, in evenly spaced blocks
_BLOCK_ROWS = 8
_ROW_LENGTH = 1 << 30  # for sorting
_VERSION = "4"

Progress = Callable[[int, int, str], None]


class Kind(NamedTuple):
    """What is measured: a scheme without the dtype of its scales.

    `grid` is what codes stand for: `Scheme.book`, or ``minimum``.
    """

    bits: int
    group: Group
    symmetric: bool = True
    grid: str = "int"

    @classmethod
    def of(cls, scheme: Scheme) -> Kind:
        """The kind of a scheme."""
        grid = "minimum" if scheme.minimum else scheme.book
        return cls(scheme.bits, scheme.group_size or ROW, scheme.symmetric, grid)

    def scheme(self, scale_dtype: str) -> Scheme:
        """With that dtype, or the one that its grid always has."""
        group = None if self.group == ROW else int(self.group)
        if self.grid == "minimum":
            return Scheme(self.bits, group, self.symmetric, "float16", minimum=True)
        dtype = scale_dtype if self.grid == "int" else "float32"
        return Scheme(self.bits, group, self.symmetric, dtype, book=self.grid)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unit:
    """Source tensors that have to get the same scheme: a linear layer, or q, k and v of one attention.

    Attributes:
        name: for people.
        tensors: their names in the source.
        shape: rows together, columns.
        damage: kinds whose groups do not divide the columns are left out.
        importance: what damage of this unit counts compared with that of others; see `glmquant.calibration.inputs`.
    """

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]
    damage: dict[Kind, float]
    importance: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """What `measure` found; `method` is the quantizer that it was found with."""

    method: str
    units: tuple[Unit, ...]

    def relative_error(self, kind: Kind) -> float | None:
        """Relative output error of one scheme for all layers: the root of the mean damage; None if not measured."""
        found = [unit.damage.get(kind) for unit in self.units]
        known = [damage for damage in found if damage is not None]
        return (sum(known) / len(known)) ** 0.5 if known and len(known) == len(found) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        units = [
            {
                "name": u.name, "tensors": u.tensors, "shape": u.shape, "importance": u.importance,
                "damage": [[*k, d] for k, d in u.damage.items()],
            }
            for u in self.units
        ]  # fmt: skip
        return {"method": self.method, "units": units}

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """The inverse of `to_json`."""
        units = tuple(
            Unit(
                u["name"],
                tuple(u["tensors"]),
                tuple(u["shape"]),
                {Kind(*kind): float(damage) for *kind, damage in u["damage"]},
                float(u.get("importance", 1)),
            )
            for u in data["units"]
        )
        return cls(data["method"], units)

    def save(self, path: PathLike) -> None:
        """Write it to a file, whole or not at all."""
        path = Path(path)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(self.to_json()))
        fresh.replace(path)

    @classmethod
    def load(cls, path: PathLike) -> Measurement:
        """What `save` wrote.

        Raises:
            SourceError: the file cannot be read, or is no measurement.
        """
        try:
            return cls.from_json(json.loads(Path(path).expanduser().read_text()))
        except OSError as error:
            raise SourceError(f"the measurement {path} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError):
            raise SourceError(
                f"{path} is no measurement; `glmquant recipes REF --measure --save FILE` writes one."
            ) from None

    def check(self, source: TensorSource, method: str) -> None:
        """Refuse to speak of another model, or of another method.

        Raises:
            UsageError: says what differs.
        """
        if self.method != method:
            raise UsageError(
                f"the measurement was made with --method {self.method} and the recipe uses {method}; measure again."
            )
        family = families.detect(source.config)
        units = family.units(family.dims(source.config))
        expected = [(_names(unit), _shape(unit)) for unit in units]
        if [(unit.tensors, unit.shape) for unit in self.units] != expected:
            raise UsageError(
                "the measurement is of a model with other layers; give one of this model, or measure again."
            )


def kinds(method: str) -> tuple[Kind, ...]:
    """What any format can hold that is quantized by `method`."""
    found = set()
    for name, fmt in formats.FORMATS.items():
        able = fmt.abilities
        if method not in able.methods:
            continue
        for bits, group, symmetric in product(able.bits, able.groups, (True, False)):
            if bits != 16 and (symmetric or bits in able.asymmetric_bits):
                recipe = Recipe(bits, group, symmetric, method, name)
                with suppress(UsageError):  # of two groups that a format has, one may be for other bits
                    found.add(Kind.of(fmt.linear_scheme(recipe, "F16")))
    return tuple(
        sorted(
            found,
            key=lambda k: (k.bits, -_ROW_LENGTH if k.group == ROW else -int(k.group), -k.symmetric, k.grid),
        )
    )


def measure(
    source: PathLike,
    method: str = "mse",
    *,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure how much every linear layer of `source` suffers under every scheme; see the module.

    Looks at 256 evenly spaced rows of each weight. The result is kept in the user's cache folder and found again
    as long as the files do not change. Weights on a hub are fetched, and stay in the cache of the hub's own client.

    Args:
        source: see `glmquant.convert`.
        method: see `glmquant.Recipe`.
        calibration: the text for a calibrated method; None is the bundled sample.
        progress: called with layers done, layers in all, and the name of the last one.

    Raises:
        SourceError: see `glmquant.convert`.
        QuantizationError: a weight holds NaN or infinity.
        UsageError: no such method.
    """
    opened = open_source(source)
    try:
        return measure_opened(opened, method, progress, calibration)
    finally:
        opened.stop_fetching()


def measure_opened(
    opened: OpenedSource,
    method: str,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Measurement:
    """See `measure`."""
    kept = _kept_at(opened, method, calibration)
    found = _read(kept)
    if found is None:
        opened.keep_in(None)
        try:
            found = Measurement(method, tuple(_measured(opened, method, progress, calibration)))
        except BaseException:
            opened.stop_fetching()  # workers wait for it
            raise
        found.save(kept)
    return found


def saved_measurement(
    opened: OpenedSource, method: str = "mse", calibration: Calibration | None = None
) -> Measurement | None:
    """What an earlier `measure` found, or None."""
    return _read(_kept_at(opened, method, calibration))


def _kept_at(opened: OpenedSource, method: str, calibration: Calibration | None) -> Path:
    state: list[tuple[object, ...]] = [
        (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in opened.source.files
    ]
    config = json.dumps(opened.source.config, sort_keys=True)
    state += [(name, file["bytes"], file["sha256"]) for name, file in opened.remote_files.items()]
    key = repr((_VERSION, _ROWS, kinds(method), method, state, config))
    if method in CALIBRATED:
        given = calibration or Calibration()
        random = given.text == RANDOM
        text = "" if random else read_text(given.text, sample=CALIBRATION_SAMPLE)
        key += repr((random, hashlib.sha256(text.encode()).hexdigest(), given.windows, given.window))
    return cache_folder("measured") / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(path: Path) -> Measurement | None:
    try:
        return Measurement.load(path)
    except SourceError:
        return None  # absent, or damaged: it is measured again


def _measured(
    opened: OpenedSource, method: str, progress: Progress | None, calibration: Calibration | None
) -> Iterator[Unit]:
    from . import quantizers

    source = opened.source
    quantizer = quantizers.data_free(method)
    facts: Mapping[str, LayerFacts] = {}
    family = families.detect(source.config)
    if method in CALIBRATED:
        from .calibration import layer_facts

        opened.fetch_sidecars()
        mixed = "native" in family.layouts  # importances are for the choice between layers
        facts = layer_facts(opened, calibration or Calibration(), progress, mixed)
    scale = TORCH_NAMES[families.stated_dtype(source.config)]
    todo = list(family.units(family.dims(source.config)))
    schemes = {kind: kind.scheme(scale) for kind in kinds(method)}
    done = 0
    if progress is not None:
        opened.on_fetched(
            lambda shard, got, size: progress(
                done, len(todo), f"fetching {shard}, {100 * got // max(1, size)} %"
            )
        )
    with tuned_for_blocks(), ThreadPoolExecutor(cores(), thread_name_prefix="glmquant-measure") as pool:
        work = pool.map(lambda unit: _measured_unit(source, quantizer, schemes, unit, facts), todo)
        for unit in work:
            yield unit
            done += 1
            if progress is not None:
                progress(done, len(todo), unit.name)
    for shard in {info.shard for info in source.infos().values()}:
        source.release(shard)


def _names(unit: LinearUnit) -> tuple[str, ...]:
    return tuple(spec.name for spec in unit.tensors)


def _shape(unit: LinearUnit) -> tuple[int, int]:
    return sum(spec.shape[0] for spec in unit.tensors), unit.tensors[0].shape[1]


def _measured_unit(
    source: TensorSource,
    quantizer: Quantizer,
    schemes: dict[Kind, Scheme],
    unit: LinearUnit,
    facts: Mapping[str, LayerFacts],
) -> Unit:
    import torch

    shape = _shape(unit)
    known = facts.get(unit.tensors[0].name)
    channels = _mean_squares(source, unit.norm, shape[1]) if known is None else known.squares
    error = {kind: 0.0 for kind, s in schemes.items() if s.group_size is None or shape[1] % s.group_size == 0}
    total = 0.0
    for spec in unit.tensors:
        rows = _sample(source, spec)
        weight = rows.float()
        share = spec.shape[0] / len(rows)
        total += share * float((weight.square().sum(0, dtype=torch.float64) * channels).sum())
        for kind in error:
            try:
                lost = (quantizer(rows, schemes[kind]).dequantize() - weight).square_()
            except QuantizationError as problem:
                raise QuantizationError(f"{spec.name} cannot be converted: {problem}.") from None
            error[kind] += share * float((lost.sum(0, dtype=torch.float64) * channels).sum())
    damage = {kind: lost / total if total else 0.0 for kind, lost in error.items()}
    return Unit(unit.name, _names(unit), shape, damage, 1.0 if known is None else known.importance)


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
