"""Bits and groups for every layer under a memory budget: what ``convert --fit`` does before it plans.

Every linear layer (q, k and v together) has a few candidates, each with its bytes and its measured damage; wanted is
the least damage in all that stays within the bytes. That is a knapsack with one choice per layer. Its Lagrangian,
damage plus a price per byte, is minimal for each layer by itself, on the lower convex hull of its candidates.
Lowering the price takes the steps on all hulls in the order of damage removed per byte. So the steps are sorted once
and taken while they fit; what this leaves is less than one step of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from . import families, formats
from ._open import OpenedSource
from ._sensitivity import Measurement, Progress, Unit, measure_opened, saved_measurement
from .errors import DoesNotFitError, UsageError
from .families import Role
from .formats import Format
from .memory import Held, Model, Workload, check_context, estimate, held_bytes, longest_context
from .plan import make_plan, resolve_recipe
from .recipe import Choice, Fit, Group, Recipe, scheme_name, show_size

_MIB = 1 << 20
_SIXTEEN: tuple[int, Group | None] = (16, None)


@dataclass(frozen=True)
class Option:
    """A candidate of a unit: bytes in memory, and damage."""

    key: tuple[int, Group | None]
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Step:
    """From one option of a unit to a better and larger one."""

    unit: int
    before: Option
    after: Option

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.after.nbytes - self.before.nbytes

    @property
    def gain(self) -> float:
        """The damage it removes."""
        return self.before.damage - self.after.damage


def fitted(
    opened: OpenedSource,
    recipe: Recipe,
    *,
    measurement: Measurement | None = None,
    keep_source: bool = False,
    progress: Progress | None = None,
) -> Recipe:
    """`recipe` with the choices of its `Fit` made.

    Args:
        opened: what is to be converted.
        recipe: with a `Fit` that has no choices yet.
        measurement: of this model; None looks for one that is kept, or measures.
        keep_source: weights that are fetched from a hub for that may stay.
        progress: of measuring.

    Raises:
        DoesNotFitError: even the smallest choice does not stay within the budget; says how small it is.
        UsageError: the format has one scheme for all layers, the context is beyond the model's, or weights on a hub
            would have to be fetched twice.
    """
    fit = recipe.fit
    assert fit is not None
    if recipe.group_size is not None or not recipe.symmetric:
        raise UsageError("--fit chooses groups, and symmetric ones; leave out --group-size and --asymmetric.")
    family = families.detect(opened.source.config)
    alike, fmt = resolve_recipe(replace(recipe, fit=None, group_size="row"), family)
    if recipe.bits != 4 or not fmt.abilities.mixed:
        possible = [name for name, other in formats.FORMATS.items() if other.abilities.mixed]
        raise UsageError(
            f"--fit chooses bits for every layer, which needs --format {' or '.join(possible)} (not for ChatGLM-6B) "
            "and no --bits; `glmquant recipes` lists what fits with one choice for all layers."
        )
    workload = Workload(fit.context, fit.batch)
    dtype = families.stated_dtype(opened.source.config)
    method = str(alike.method)
    measured = measurement or saved_measurement(opened, method, alike.calibration)
    if measured is None:
        if opened.remote is not None and opened.remote.missing_bytes and not keep_source:
            raise UsageError(
                "--fit measures every layer before it converts, which would fetch this model twice; add --keep-source, "
                "or give what was measured before (--measurement FILE)."
            )
        measured = measure_opened(opened, method, progress, alike.calibration)
    measured.check(opened.source, method)
    options = [_options(unit, dtype, fmt) for unit in measured.units]

    def model(keys: list[tuple[int, Group | None]]) -> Model:
        choices = [
            Choice(unit.name, unit.tensors, *key) for unit, key in zip(measured.units, keys, strict=True)
        ]
        return Model.of_plan(
            make_plan(opened.source, _with(recipe, replace(fit, choices=tuple(choices)))), dtype
        )

    smallest = model([found[0].key for found in options])
    check_context(smallest, fit.context)
    least = estimate(smallest, workload)
    if least.peak > fit.budget:
        raise DoesNotFitError(_too_small(recipe, smallest, workload, fit.budget, least.peak))
    spare = fit.budget - least.peak
    while True:
        taken, refused = spend(options, spare)
        keys = [found[0].key for found in options]
        for step in taken:
            keys[step.unit] = step.after.key
        peak = estimate(model(keys), workload).peak
        if peak <= fit.budget:
            break
        spare -= peak - fit.budget  # not all terms grow with the weights alone
    choices = tuple(_explained(measured, options, keys, taken, refused))
    return _with(recipe, replace(fit, predicted=peak, choices=choices))


def spend(options: list[list[Option]], spare: int) -> tuple[list[Step], list[Step]]:
    """The steps on all convex hulls that `spare` bytes pay for, best first, and those that they do not.

    Args:
        options: of every unit, the smallest first.
        spare: bytes beyond the smallest options.
    """
    steps = [step for unit, found in enumerate(options) for step in _hull(unit, found)]
    steps.sort(key=lambda step: (-step.gain / step.nbytes, step.unit))
    taken: list[Step] = []
    refused: list[Step] = []
    stopped: set[int] = set()
    for step in steps:
        if step.unit in stopped or step.nbytes > spare:
            stopped.add(step.unit)  # later steps of the unit begin where this one ends
            refused.append(step)
        else:
            spare -= step.nbytes
            taken.append(step)
    return taken, refused


def _hull(unit: int, options: list[Option]) -> list[Step]:
    """Steps along the lower convex hull, each removing less damage per byte than the one before."""
    steps: list[Step] = []
    current = options[0]
    while True:
        better = [
            Step(unit, current, o) for o in options if o.nbytes > current.nbytes and o.damage < current.damage
        ]
        if not better:
            return steps
        steps.append(max(better, key=lambda step: (step.gain / step.nbytes, step.nbytes)))
        current = steps[-1].after


def _options(unit: Unit, dtype: str, fmt: Format) -> list[Option]:
    """What a unit can be, the smallest first; nothing that is both larger and worse than another is of use later."""
    scale = fmt.scale_dtype(dtype)
    found = [Option(_SIXTEEN, sum(held_bytes(Held(Role.LINEAR, unit.shape, None), dtype, "cuda")), 0.0)]
    for kind, damage in unit.damage.items():
        # One with zero points cannot be mixed with others: see `formats.compressed_tensors`.
        if (
            kind.symmetric
            and kind.grid == "int"
            and kind.bits in fmt.abilities.bits
            and kind.group in fmt.abilities.groups
        ):
            held = Held(Role.LINEAR, unit.shape, kind.scheme(scale))
            found.append(
                Option(
                    (kind.bits, kind.group), sum(held_bytes(held, dtype, "cuda")), unit.importance * damage
                )
            )
    return sorted(found, key=lambda option: (option.nbytes, option.damage))


def _with(recipe: Recipe, fit: Fit) -> Recipe:
    """`recipe` with these choices; where all of them are 16 bit, nothing is quantized at all."""
    if all(choice.bits == 16 for choice in fit.choices):
        plain = Recipe(layout=recipe.layout, max_shard_size=recipe.max_shard_size)
        fit = replace(fit, unused=tuple(_unused(recipe)))
        return replace(plain, fit=fit, bits=16, format="safetensors")
    return replace(recipe, fit=fit)


def _unused(recipe: Recipe) -> Iterator[str]:
    """The options that quantizing would have needed."""
    if recipe.format not in (None, "safetensors"):
        yield f"--format {recipe.format}"
    if recipe.method is not None:
        yield f"--method {recipe.method}"
    if recipe.calibration is not None:
        yield "--calibration"
    if recipe.quantize_head:
        yield "--quantize-head"
    if recipe.quantize_embeddings:
        yield "--quantize-embeddings"


def _too_small(recipe: Recipe, smallest: Model, workload: Workload, budget: int, least: int) -> str:
    advice = ["raise the budget"]
    longest = longest_context(smallest, workload, budget)
    if longest:
        advice.append(f"lower --context to {longest} or less")
    elif workload.context > 1:
        shortest = estimate(smallest, replace(workload, context=1)).peak
        advice.append(f"lower --context as well (with 1 token it takes {show_size(shortest)})")
    if workload.batch > 1:
        advice.append("lower --batch")
    ends = [
        option
        for option, used in (
            ("--quantize-head", recipe.quantize_head),
            ("--quantize-embeddings", recipe.quantize_embeddings),
        )
        if not used
    ]
    if ends:
        advice.append(f"add {' and '.join(ends)}")
    return (
        f"with {workload.batch} x {workload.context} tokens this model takes {show_size(least)} at the smallest, and "
        f"the budget is {show_size(budget)}; {', or '.join(advice)}."
    )


def _explained(
    measured: Measurement,
    options: list[list[Option]],
    keys: list[Any],
    taken: list[Step],
    refused: list[Step],
) -> list[Choice]:
    """The choices, each with its reason: the last step that was paid for, and the first that was not.

    Steps are judged by the damage that a MiB removes, so what the cheapest one that was taken removes is the price.
    """
    whole = sum(found[0].damage for found in options) or 1.0

    def rate(step: Step) -> float:
        return 100 * step.gain / whole / (step.nbytes / _MIB)

    def shown(step: Step) -> str:
        size, share = step.nbytes / _MIB, 100 * step.gain / whole
        return f"removes {share:.2g} % of the damage for {size:.2f} MiB, {rate(step):.2g} % a MiB"

    last = {step.unit: step for step in taken}
    following: dict[int, Step] = {}
    for later in refused:
        following.setdefault(later.unit, later)
    price = min((rate(step) for step in taken), default=0.0)
    choices = []
    for number, (unit, key) in enumerate(zip(measured.units, keys, strict=True)):
        parts = []
        if number in last:
            step = last[number]
            parts.append(f"instead of {scheme_name(*step.before.key)} it {shown(step)}")
        else:
            parts.append("the smallest there is")
        if number in following:
            step = following[number]
            parts.append(f"{scheme_name(*step.after.key)} instead {shown(step)}")
            spent = f"the budget ended at {price:.2g} % a MiB"
            parts.append(spent if rate(step) < price else "more than the budget had left")
        choices.append(Choice(unit.name, unit.tensors, key[0], key[1], "; ".join(parts)))
    return choices
