"""What the commands print with: sizes, rows, tables, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from .._pace import of_block
from ..recipe import show_size

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """The ``--json`` of every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")(command)


def endpoint_option(command: F) -> F:
    """The ``--endpoint`` of commands that read a model: the setting of both hubs' clients, for this process.

    They read it when they are first imported, which no command has done yet.
    """

    def set_it(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            os.environ["HF_ENDPOINT"] = os.environ["MODELSCOPE_ENDPOINT"] = value

    return click.option(
        "--endpoint", metavar="URL", expose_value=False, callback=set_it,
        help="A mirror, for a model on a hub.  [default: HF_ENDPOINT, MODELSCOPE_ENDPOINT]",
    )(command)  # fmt: skip


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Print names and what belongs to them."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}".rstrip())


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())


@contextmanager
def progress_bar(
    verb: str, *, quiet: bool, unit: str = "bytes"
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A live bar on a terminal; elsewhere a line every tenth of the way, and for whatever is told of a block; nothing
    with --json; all on stderr.
    """
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        shown = -1

        def lines(done: int, total: int, name: str) -> None:
            nonlocal shown
            tenth = 10 * done // max(1, total)
            if of_block(name):
                click.echo(f"{verb}: {name}", err=True)
            elif tenth != shown:
                shown = tenth
                amount = f" of {show_size(total)}" if unit == "bytes" else ""
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
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Remaining(TimeRemainingColumn):
        """Where what is told has an estimate of its own, bytes say nothing of the time."""

        def render(self, task: Task) -> Text:
            return Text() if of_block(task.fields["tensor"]) else super().render(task)

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        if unit == "bytes"
        else [MofNCompleteColumn()]
    )
    columns += [Remaining(), TextColumn("{task.fields[tensor]}")]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None, tensor="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, tensor=name)
