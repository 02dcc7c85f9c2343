"""What a report looks like: rows for a terminal or Markdown, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from .cases import Result, Spread, Workload

_HEADER = (
    "checkpoint", "runtime", "dtype", "batch", "load s", "weights GiB", "peak GiB",
    "first token s", "prefill tok/s", "decode tok/s",
)  # fmt: skip


def parse(report: dict[str, Any]) -> tuple[Workload, list[Result]]:
    """The workload and the results of a report."""
    workload = Workload(**{**report["workload"], "batches": tuple(report["workload"]["batches"])})
    return workload, [Result.from_json(result) for result in report["results"]]


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A header, then rows of ten columns; a candidate that failed has one row of three, the last of which says why."""
    workload, results = parse(report)
    rows: list[tuple[str, ...]] = [_HEADER]
    for result in results:
        name = Path(result.candidate.path).name, result.candidate.runtime
        if result.error is not None:
            rows.append((*name, result.error))
            continue
        for batch in workload.batches:
            speeds = result.speeds(workload, batch)
            memory = result.memory.get("process", result.memory.get("reserved"))
            rows.append(
                (
                    *name,
                    result.dtype,
                    str(batch),
                    f"{result.load_seconds:.1f}",
                    f"{result.weight_bytes / 2**30:.2f}",
                    "?" if memory is None else f"{memory / 2**30:.2f}",
                    *map(_shown, (speeds.first_token, speeds.prefill, speeds.decode)),
                )
            )
    return rows


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
    rows = table(report)
    whole = [row for row in rows if len(row) == len(_HEADER)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(_HEADER))]
    for column in (0, 1):
        widths[column] = max(widths[column], *(len(row[column]) for row in rows))
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        if len(row) == len(_HEADER):
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        else:
            right = [f"failed: {row[2]}"]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join([*lines, about(report)])


def markdown(report: dict[str, Any]) -> str:
    """A table for a README."""
    lines = []
    for number, row in enumerate(table(report)):
        cells = list(row)
        if len(cells) < len(_HEADER):
            cells = [*cells[:2], f"failed: {cells[2]}", *[""] * (len(_HEADER) - 3)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if number == 0:
            lines.append("|---|---|" + "---:|" * (len(_HEADER) - 2))
    return "\n".join([*lines, "", about(report)])


def plot(report: dict[str, Any], path: Path) -> None:
    """Peak memory against tokens per second, as an image whose type the suffix of `path` decides.

    Raises:
        UsageError: matplotlib is not installed, no candidate has figures, or the type is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'glmquant[bench]'.") from None
    workload, results = parse(report)
    found = [result for result in results if result.error is None and result.memory]
    if not found:
        raise UsageError("no candidate has figures, so there is nothing to plot.")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for batch in workload.batches:
        for result in found:
            memory = result.memory.get("process", result.memory.get("reserved", 0)) / 2**30
            speed = result.speeds(workload, batch).decode
            error = [[speed.median - speed.low], [speed.high - speed.median]]
            name = f"{Path(result.candidate.path).name}, {result.candidate.runtime}, batch {batch}"
            axes.errorbar(memory, speed.median, yerr=error, fmt="o", capsize=3, label=name)
    axes.set_xlabel("peak memory of the process, GiB")
    axes.set_ylabel("decode, tokens per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"{path} cannot be written ({error}).") from None
