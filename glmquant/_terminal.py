"""What the commands show: rows, sizes, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
GIB = 2**30


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")(command)


def size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"


def print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")


@contextmanager
def progress(
    verb: str, *, quiet: bool, unit: str = "bytes"
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A live bar on a terminal, a line every tenth of the way elsewhere, nothing with --json; all on stderr."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        shown = -1

        def lines(done: int, total: int, name: str) -> None:
            nonlocal shown
            tenth = 10 * done // max(1, total)
            if tenth != shown:
                shown = tenth
                amount = f" of {size(total)}" if unit == "bytes" else ""
                click.echo(f"{verb}: {10 * tenth:3d} %{amount} ({name})", err=True)

        yield lines
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        if unit == "bytes"
        else [MofNCompleteColumn()]
    )
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[tensor]}")]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None, tensor="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, tensor=name)
