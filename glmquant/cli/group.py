"""What ends a command: errors as one sentence with the exit status that goes with them, and Ctrl-C."""

from __future__ import annotations

import errno
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..errors import GlmquantError


class Group(click.Group):
    """Turns our errors into one sentence and the exit status that goes with them."""

    def invoke(self, ctx: click.Context) -> Any:
        with _noting_interrupts() as interrupts:
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit):
                raise
            except (Exception, KeyboardInterrupt) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    advice = (
                        "; OUT is as it was, the same command with --resume goes on from the whole shards"
                        if ctx.invoked_subcommand == "convert"
                        else ""
                    )
                    self._fail(ctx, f"interrupted{advice}.", 130)
                if isinstance(error, GlmquantError):
                    self._fail(ctx, str(error), error.exit_status)
                # `glmquant inspect ... | head` is left to click, which ends quietly.
                if isinstance(error, OSError) and error.errno != errno.EPIPE:
                    # a disk or a permission that nobody foresaw
                    where = f"{error.filename}: " if error.filename else ""
                    self._fail(ctx, f"{where}{error.strerror or error}.", GlmquantError.exit_status)
                raise

    @staticmethod
    def _fail(ctx: click.Context, message: str, status: int) -> NoReturn:
        if ctx.params.get("debug"):
            traceback.print_exc()
        click.echo(f"glmquant: {message}", err=True)
        ctx.exit(status)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and leaves a note.

    The note is needed where native code was calling back into Python: safetensors for one turns whatever it gets
    there into an error of its own.
    """
    noted: list[int] = []

    def handle(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    # Only the main thread may, and whoever ignores the signal (nohup) goes on ignoring it.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
