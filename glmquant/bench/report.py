"""What a report looks like: rows for a terminal or Markdown, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from .cases import Result, Spread, Workload

_LEFT = ("checkpoint", "runtime")
_GIB = 1 << 30
# Peaks that are shown: header, where in `Result.memory`, and what of the prediction stands beside it.
_ON_CPU = (("RSS GiB", "process", "peak"),)
_ON_GPU = (
    ("allocated GiB", "allocated", "allocated"),
    ("reserved GiB", "reserved", None),
    ("process GiB", "process", "peak"),
)
_TERMS = ("process itself", "weights", "KV cache", "everything else")


def parse(report: dict[str, Any]) -> tuple[Workload, list[Result]]:
    """The workload and the results of a report."""
    workload = Workload(**{**report["workload"], "batches": tuple(report["workload"]["batches"])})
    return workload, [Result.from_json(result) for result in report["results"]]


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A header, then rows; a candidate that failed has one row of three cells, the last of which says why."""
    workload, results = parse(report)
    peaks = _ON_GPU if any(result.device.startswith("cuda") for result in results) else _ON_CPU
    header = [*_LEFT, "dtype", "batch", "load s", "weights GiB"]
    for title, _, predicted in peaks:
        header += [title, "predicted"] if predicted else [title]
    rows = [(*header, "first token s", "prefill tok/s", "decode tok/s")]
    for result in results:
        name = _name(result)
        if result.error is not None:
            rows.append((*name, result.error))
            continue
        memory: list[str] = []
        for _, key, predicted in peaks:
            memory.append(_gib(result.memory.get(key)))
            if predicted:
                memory.append(_gib(None if result.predicted is None else result.predicted[predicted]))
        for batch in workload.batches:
            speeds = result.speeds(workload, batch)
            rows.append(
                (
                    *name,
                    result.dtype,
                    str(batch),
                    f"{result.load_seconds:.1f}",
                    _gib(result.weight_bytes),
                    *memory,
                    *map(_shown, (speeds.first_token, speeds.prefill, speeds.decode)),
                )
            )
    return rows


def terms(result: Result) -> tuple[dict[str, int], dict[str, int]] | None:
    """Bytes by term at the peak, predicted and measured; None unless there are both.

    What is not the process itself, weights or cache cannot be told apart from outside: activations, unpacked weights,
    and what allocators hold beyond what is in use.
    """
    predicted, memory = result.predicted, result.memory
    if predicted is None or not {"base", "process", "cache"} <= memory.keys():
        return None
    resident = predicted["weights"] + predicted["scales"] + predicted["rest"]
    found = []
    for parts, peak in (
        ((predicted["process_base"], resident, predicted["cache"]), predicted["peak"]),
        ((memory["base"], result.weight_bytes, memory["cache"]), memory["process"]),
    ):
        found.append(dict(zip(_TERMS, (*parts, max(0, peak - sum(parts))), strict=True)))
    return found[0], found[1]


def memory_table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Predicted / measured GiB by term, of the largest batch; only a header if nothing was predicted."""
    rows: list[tuple[str, ...]] = [(*_LEFT, *_TERMS, "peak", "predicted too high by")]
    for result in parse(report)[1]:
        both = terms(result)
        if both is None or result.predicted is None:
            continue
        predicted, measured = both
        cells = [f"{predicted[name] / _GIB:.3f} / {measured[name] / _GIB:.3f}" for name in _TERMS]
        peaks = result.predicted["peak"], result.memory["process"]
        cells.append(f"{peaks[0] / _GIB:.3f} / {peaks[1] / _GIB:.3f}")
        rows.append((*_name(result), *cells, f"{100 * (peaks[0] / peaks[1] - 1):+.1f} %"))
    return rows


def _name(result: Result) -> tuple[str, str]:
    return Path(result.candidate.path).name, result.candidate.runtime


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / _GIB:.2f}"


def _shown(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g}-{spread.high:.3g})"


def about(report: dict[str, Any]) -> str:
    """One line on what was done and where."""
    workload, results = parse(report)
    where = ", ".join(sorted({r.device for r in results if r.device})) or "nowhere"
    hardware = report["hardware"]
    gpu = f", {hardware['gpu']}" if "gpu" in hardware else ""
    return (
        f"{workload.prompt} tokens of prompt, {workload.new} new; median (least-most) of {workload.repetitions} runs "
        f"on {where}: {hardware['cpu']}, {hardware['cores']} cores{gpu}; torch {report['versions'].get('torch', '?')}"
    )


def text(report: dict[str, Any]) -> str:
    """For a terminal."""
    parts = [_columns(table(report)), about(report)]
    memory = memory_table(report)
    if len(memory) > 1:
        parts += ["", "memory, predicted / measured GiB", _columns(memory)]
    return "\n".join(parts)


def _columns(rows: list[tuple[str, ...]]) -> str:
    count = len(rows[0])
    whole = [row for row in rows if len(row) == count]
    widths = [max(len(row[column]) for row in whole) for column in range(count)]
    for column in range(len(_LEFT)):
        widths[column] = max(widths[column], *(len(row[column]) for row in rows))
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        if len(row) == count:
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        else:
            right = [f"failed: {row[2]}"]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """Tables for a README."""
    parts = [_pipes(table(report)), "", about(report)]
    memory = memory_table(report)
    if len(memory) > 1:
        parts += ["", "Memory, predicted / measured GiB:", "", _pipes(memory)]
    return "\n".join(parts)


def _pipes(rows: list[tuple[str, ...]]) -> str:
    count = len(rows[0])
    lines = []
    for number, row in enumerate(rows):
        cells = list(row)
        if len(cells) < count:
            cells = [*cells[:2], f"failed: {cells[2]}", *[""] * (count - 3)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if number == 0:
            lines.append("|---|---|" + "---:|" * (count - 2))
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Peak memory against tokens per second, and memory by term, as an image whose type the suffix of `path` decides.

    Raises:
        UsageError: matplotlib is not installed, no candidate has figures, or the type is unknown.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'glmquant[bench]'.") from None
    workload, results = parse(report)
    found = [result for result in results if result.error is None and result.memory.get("process")]
    if not found:
        raise UsageError("no candidate has figures, so there is nothing to plot.")
    split = [(result, both) for result in found if (both := terms(result)) is not None]
    # The same bytes for the same report: no date, ids from a fixed seed; text stays text.
    with rc_context({"svg.hashsalt": "glmquant", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11 if split else 7, 4.5), layout="constrained")
        axes = figure.subplots(1, 2) if split else [figure.add_subplot()]
        _speeds(axes[0], workload, found)
        if split:
            _bars(axes[1], split)
        try:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, metadata=metadata)
        except ValueError as error:
            raise UsageError(f"{path} cannot be written ({error}).") from None


def _speeds(axes: Any, workload: Workload, results: list[Result]) -> None:
    for batch in workload.batches:
        for result in results:
            speed = result.speeds(workload, batch).decode
            error = [[speed.median - speed.low], [speed.high - speed.median]]
            name = f"{', '.join(_name(result))}, batch {batch}"
            axes.errorbar(
                result.memory["process"] / _GIB, speed.median, yerr=error, fmt="o", capsize=3, label=name
            )
    axes.set_xlabel("peak memory of the process, GiB")
    axes.set_ylabel("decode, tokens per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _bars(axes: Any, split: list[tuple[Result, tuple[dict[str, int], dict[str, int]]]]) -> None:
    """Two bars for each result: what was predicted, and what was measured."""
    names = []
    for result, _ in split:
        name = "\n".join(_name(result))
        names += [f"{name}\npredicted", "measured"]
    bars = [part for _, both in split for part in both]
    places = [number + number // 2 * 0.5 for number in range(len(bars))]
    start = [0.0] * len(bars)
    for term in _TERMS:
        widths = [bar[term] / _GIB for bar in bars]
        axes.barh(places, widths, left=start, label=term)
        start = [s + w for s, w in zip(start, widths, strict=True)]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("memory at the peak, GiB")
    axes.legend(fontsize=8)
