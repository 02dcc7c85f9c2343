"""The folder being written: a sibling with a temporary name, a lock, a journal, and a rename at the end.

A folder with the final name is always whole. Everything happens in ``OUT.partial``; the last step renames it.
A killed run leaves ``OUT.partial`` with a journal of the shards that are whole, from which ``--resume`` goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import OutputError

if TYPE_CHECKING:
    from typing_extensions import Self

_JOURNAL = "progress.json"
_LOCK = ".lock"
REPORT = "quantization_report.json"


class OutputFolder:
    """A folder that appears whole or not at all; use as a context manager.

    Args:
        out: the final folder.
        digest: identifies what is to be written; a journal with another digest is not resumed.
        resume: go on from the shards that an earlier run finished.
        force: replace `out` if it exists and was written by glmquant.

    Attributes:
        partial: where to write until `commit`.
        finished: journal entries of the shards that an earlier run finished, by file name.
    """

    def __init__(self, out: Path, digest: str, *, resume: bool = False, force: bool = False) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.finished: dict[str, Any] = {}
        self._digest, self._resume, self._force = digest, resume, force
        self._lock = FileLock(self.partial / _LOCK)

    def __enter__(self) -> Self:
        check_out(self.out, force=self._force)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"another glmquant is writing {self.out} at this moment ({self.partial} is locked); "
                "wait for it, or choose another OUT."
            ) from None
        except OSError as error:
            raise OutputError(f"cannot write to {self.partial}: {error.strerror}.") from None
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        if kind is not None and not self.finished and self.partial.exists():
            # Nothing in it is worth resuming.
            shutil.rmtree(self.partial, ignore_errors=True)

    def _prepare(self) -> None:
        journal = self.partial / _JOURNAL
        if self._resume and journal.exists():
            try:
                state = json.loads(journal.read_text())
                shards = dict(state["shards"])
                digest = state["digest"]
            except (OSError, ValueError, KeyError, TypeError):
                shards, digest = {}, self._digest  # a damaged journal vouches for nothing
            if digest != self._digest:
                raise OutputError(
                    f"{self.partial} was begun with other options or from another source; run the command that "
                    "began it with --resume, or without --resume to start over."
                )
            self.finished = shards
        for path in self.partial.iterdir():
            if path.name not in {_LOCK, _JOURNAL, *self.finished}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_journal()

    def forget(self, file: str) -> None:
        """Drop a shard that turned out not to be whole."""
        self.finished.pop(file, None)
        (self.partial / file).unlink(missing_ok=True)
        self._write_journal()

    def record(self, file: str, entry: Any) -> None:
        """Enter a whole shard into the journal."""
        self.finished[file] = entry
        self._write_journal()

    def _write_journal(self) -> None:
        fresh = self.partial / (_JOURNAL + ".new")
        write_synced(fresh, json.dumps({"digest": self._digest, "shards": self.finished}).encode())
        fresh.replace(self.partial / _JOURNAL)

    def commit(self) -> None:
        """Give the folder its final name, replacing an earlier one in a single step where the system can.

        Raises:
            OutputError: something else took the name meanwhile.
        """
        (self.partial / _JOURNAL).unlink()
        _sync_folder(self.partial)
        old = None
        try:
            if self.out.exists() and any(self.out.iterdir()):
                check_out(self.out, force=self._force)
                old = _exchange(self.partial, self.out)
            else:
                self.partial.rename(self.out)
        except OSError as error:
            raise OutputError(
                f"cannot rename {self.partial} to {self.out} ({error.strerror}); the converted model is whole "
                "and stays there under its temporary name."
            ) from None
        _sync_folder(self.out.parent)
        (self.out / _LOCK).unlink(missing_ok=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an `out` that would be overwritten.

    Raises:
        OutputError: it exists and `force` is not given, or it is not something glmquant wrote.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder; choose another OUT.")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out} exists; choose another OUT, or replace it with --force.")
    if not (out / REPORT).exists():
        raise OutputError(
            f"{out} exists and was not written by glmquant (it has no {REPORT}), so --force does not replace it; "
            "remove it yourself or choose another OUT."
        )


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> Path:
    """Put `new` in the place of `old`; returns where the old folder is now.

    Linux swaps two names in one step (renameat2 with RENAME_EXCHANGE), so that the final name never vanishes.
    Elsewhere the old folder steps aside first.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        rename = None
    at_cwd, exchange = -100, 2
    if rename and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return new
    aside = old.with_name(old.name + ".replaced")
    old.rename(aside)
    new.rename(old)
    return aside
