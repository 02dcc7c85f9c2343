"""Every recipe for a source, with what it would take: what ``glmquant recipes`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import families, formats
from ._open import PathLike, open_source
from ._sensitivity import Kind, Measurement, Progress, measure_opened, saved_measurement
from .checkpoint.source import TensorSource
from .errors import UsageError
from .families import Role
from .formats import Abilities
from .memory import Memory, Model, Workload, check_context, estimate, longest_context
from .plan import make_plan
from .recipe import CALIBRATED, Calibration, Recipe
from .scheme import GROUP_SIZES, Scheme


@dataclass(frozen=True)
class RecipeRow:
    """One recipe.

    Attributes:
        name: format, scheme.
        recipe: every choice filled in.
        file_bytes: exactly what `glmquant.convert` would write as weights.
        bits_per_weight: of these files.
        error: relative output error of the linear layers, where `glmquant.measure` has measured this source; None
            also for W8A8, of which it knows the weights alone.
        memory: at the context that was asked for; None where the runtime cannot read it, `why` says why.
        fits: whether it stays within the budget; None without one.
        longest: longest context within the budget; None without one.
        why: why there are no figures.
    """

    name: str
    recipe: Recipe
    file_bytes: int
    bits_per_weight: float
    error: float | None
    memory: Memory | None
    fits: bool | None
    longest: int | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "recipe": self.recipe.to_json(),
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "relative_output_error": self.error,
            "memory": self.memory.to_json() if self.memory else None,
            "fits": self.fits,
            "longest_context": self.longest,
            "why": self.why or None,
        }


def recipes(
    ref: PathLike,
    workload: Workload,
    *,
    budget: int | None = None,
    runtime: str = "glmquant",
    device: Literal["cuda", "cpu"] = "cuda",
    tp: int = 1,
    quantize_head: bool = False,
    method: str | None = None,
    calibration: Calibration | None = None,
    measure: bool = False,
    measuring: Progress | None = None,
) -> list[RecipeRow]:
    """Every recipe that goes with the source `ref`, smallest files first; headers are read and nothing else.

    Args:
        ref: a 16-bit checkpoint, or THUDM's INT4 / INT8.
        workload: what is to run.
        budget: bytes that there are.
        runtime: see `glmquant.memory.estimate`.
        device: see there.
        tp: see there.
        quantize_head: with the output head in 8 bit, where a format has that.
        method: the quantizer, for the formats that take it; None is the default of each.
        calibration: for a calibrated method.
        measure: read the weights too, for the errors; without it there are those that were measured before.
        measuring: called with layers measured, layers in all, and the last one's name.

    Raises:
        SourceError: see `glmquant.convert`.
        UsageError: a context beyond the model's, a runtime that does not exist or cannot be split, a method that no
            format takes, or a calibration without a calibrated one.
    """
    if calibration is not None and method not in CALIBRATED:
        raise UsageError(f"--calibration is for --method {', '.join(CALIBRATED)}; give one of them.")
    opened = open_source(ref)
    source = opened.source
    wanted = Recipe(method=method, calibration=calibration, quantize_head=quantize_head)
    possible = list(possible_recipes(source, wanted))
    if method is not None and all(recipe.method != method for recipe in possible):
        raise UsageError(f"no recipe for this model has --method {method}; leave it out.")
    check_context(Model.of_plan(make_plan(source, possible[0]), "F16"), workload.context)
    measured: dict[str | None, Measurement | None] = {}
    for name, text in {recipe.method: recipe.calibration for recipe in possible}.items():
        if name is not None:
            measured[name] = (
                measure_opened(opened, name, measuring, text)
                if measure
                else saved_measurement(opened, name, text)
            )
    opened.stop_fetching()
    rows = [
        _row(source, recipe, workload, budget, runtime, device, tp, measured.get(recipe.method))
        for recipe in possible
    ]
    return sorted(rows, key=lambda row: row.file_bytes)


def possible_recipes(source: TensorSource, wanted: Recipe | None = None) -> Iterator[Recipe]:
    """What the table of formats allows for this source and its widths.

    Args:
        source: a checkpoint.
        wanted: its method, with its calibration, and quantized head are taken where there is such a thing.
    """
    wanted = wanted or Recipe()
    for name, fmt in formats.FORMATS.items():
        for recipe in _combinations(name, fmt.abilities):
            if wanted.method in fmt.abilities.methods and recipe.bits != 16:
                recipe = replace(recipe, method=wanted.method, calibration=wanted.calibration)
            for head in (True, False) if wanted.quantize_head and recipe.bits != 16 else (False,):
                try:
                    yield make_plan(source, replace(recipe, quantize_head=head)).recipe
                    break
                except UsageError:
                    continue  # groups that do not divide a width, or a family that the format does not hold


def _combinations(name: str, abilities: Abilities) -> Iterator[Recipe]:
    for bits in abilities.bits:
        for group in (abilities.groups if bits != 16 else ()) or (None,):
            yield Recipe(bits=bits, group_size=group, format=name)
            if bits in abilities.asymmetric_bits:
                yield Recipe(bits=bits, group_size=group, format=name, symmetric=False)
    for activations in abilities.activations:
        yield Recipe(bits=8, format=name, activations=activations)


def _row(
    source: TensorSource,
    recipe: Recipe,
    workload: Workload,
    budget: int | None,
    runtime: str,
    device: Literal["cuda", "cpu"],
    tp: int,
    measured: Measurement | None,
) -> RecipeRow:
    plan = make_plan(source, recipe)
    model = Model.of_plan(plan, families.stated_dtype(source.config))
    memory = estimate(model, workload, runtime, device, tp)
    why = _objection(recipe, plan.family, runtime) or (admits(model, recipe, tp) if tp > 1 else "")
    ends = ", head int8" if recipe.quantize_head else ""
    scheme = next(item.scheme for item in plan.items if item.role is Role.LINEAR)
    longest = None
    if budget is not None and not why:
        longest = longest_context(model, workload, budget, runtime, device, tp)
    return RecipeRow(
        name=f"{recipe.format} {scheme or '16 bit'}{ends}",
        recipe=recipe,
        file_bytes=plan.nbytes,
        bits_per_weight=round(8 * plan.nbytes / model.weights, 3),
        error=_error(scheme, measured),
        memory=None if why else memory,
        fits=None if budget is None or why else memory.peak <= budget,
        longest=longest,
        why=why,
    )


def _error(scheme: Scheme | None, measured: Measurement | None) -> float | None:
    if scheme is None:
        return 0.0
    # W8A8 rounds activations too, and how much that loses nobody has measured.
    if measured is None or scheme.activations is not None:
        return None
    return measured.relative_error(Kind.of(scheme))


def _objection(recipe: Recipe, family: str, runtime: str) -> str:
    """Why `runtime` does not read what `recipe` gives; empty if it does."""
    if runtime not in formats.get(str(recipe.format)).abilities.runtimes:
        return f"{runtime} does not read {recipe.format}"
    if runtime != "glmquant" and family == "chatglm":
        return f"{runtime} has no ChatGLM-6B"
    return ""


def admits(model: Model, recipe: Recipe, tp: int) -> str:
    """Why `tp` GPUs cannot share the model's layers; empty if they can.

    Tensor parallelism cuts o_proj and down_proj along their columns, and a group of columns has to stay whole; the
    other layers are cut along their rows, at heads.
    """
    dims = model.dims
    for what, count in (("attention heads", dims.heads), ("MLP columns", dims.ffn)):
        if count % tp:
            return f"{tp} GPUs cannot share {count} {what} evenly"
    if not isinstance(recipe.group_size, int):
        return ""
    for columns in (dims.heads * dims.head_dim, dims.ffn):
        if columns // tp % recipe.group_size:
            fitting = [g for g in GROUP_SIZES if columns // tp % g == 0]
            possible = (
                f"groups that do: {', '.join(map(str, fitting))}" if fitting else "no group does, only row"
            )
            return f"group {recipe.group_size} does not divide {columns} / {tp} columns; {possible}"
    return ""
