"""The folder being written: a sibling with a temporary name, a lock, a journal, and a rename at the end.

A folder with the final name is always whole. Everything happens in ``OUT.partial``; the last step renames it.
A killed run leaves ``OUT.partial`` with a journal of the shards that are whole, from which ``--resume`` goes on.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import ModelError, OutputError, QuantizationError, SourceError
from ..recipe import show_size

if TYPE_CHECKING:
    from typing_extensions import Self

_JOURNAL = ".glmquant-journal.json"
_LOCK = ".glmquant-lock"
_FETCHED = ".glmquant-source"
_CALIBRATED = ".glmquant-calibrated"
REPORT = "quantization_report.json"
CARD = "README.md"
EVALUATION = "evaluation.json"
_SEAL = b"<!-- written by glmquant; SHA-256 of the text above: %s -->\n"


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
        begun: the journal's entry of the shard after these, if an earlier run left the beginning of it.
        fetched: where files of the source may be kept; what is there is resumed like everything else.
        calibrated: where calibration may keep the blocks that it is done with; the same.
    """

    def __init__(self, out: Path, digest: str, *, resume: bool = False, force: bool = False) -> None:
        # A link keeps pointing where it points; what it points to is written and replaced.
        self.out = out = out.resolve() if out.is_symlink() else out
        self.partial = out.with_name(out.name + ".partial")
        self.fetched = self.partial / _FETCHED
        self.calibrated = self.partial / _CALIBRATED
        self.finished: dict[str, Any] = {}
        self.begun: dict[str, Any] | None = None
        self._digest, self._resume, self._force = digest, resume, force
        self._goes_on = False  # a journal says that an earlier run was asked for the same
        self._lock = FileLock(self.partial / _LOCK)

    def __enter__(self) -> Self:
        check_out(self.out, force=self._force)
        try:
            self._check_partial()
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"another glmquant is writing {self.out} at this moment ({self.partial} is locked); "
                "wait for it, or choose another OUT."
            ) from None
        except OSError as error:
            raise write_error(self.partial, error) from None
        try:
            self.finished, self.begun = self._resumable()
        except BaseException:
            self._lock.release()  # and nothing else: somebody's work is in there
            raise
        try:
            _empty(
                self.partial,
                keep={
                    _LOCK,
                    _JOURNAL,
                    *self.finished,
                    *([self.begun["file"]] if self.begun else []),
                    *([_FETCHED] if self._resume else []),
                    *([_CALIBRATED] if self._goes_on else []),
                },
            )
            self._write_journal()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            if isinstance(error, OSError):
                raise write_error(self.partial, error) from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self.finished and not self._worth_resuming(error):
            # Nothing in it is worth resuming. Removed under the lock: a moment later it may be somebody else's.
            _remove(self.partial)
        self._lock.release()

    def _worth_resuming(self, error: BaseException | None) -> bool:
        """Whether files of the source were fetched or blocks calibrated, and it is not for what is in them that the
        run has ended: whatever else it was (a disk, a network, memory, a bug), hours of work are not to be lost.
        """
        begun = self.begun is not None or self.fetched.exists() or self.calibrated.exists()
        return begun and not isinstance(error, (ModelError, QuantizationError, SourceError))

    def _check_partial(self) -> None:
        """Refuse a folder of that name that no glmquant left behind: it is about to be emptied."""
        if not self.partial.is_dir():
            return
        found = {path.name for path in self.partial.iterdir()}
        if found and found.isdisjoint({_LOCK, _JOURNAL}):
            what = "a whole model" if REPORT in found else "something else"
            raise OutputError(
                f"{self.partial} is where {self.out} would be written, and it holds {what}; "
                "move it away or choose another OUT."
            )

    def _resumable(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Journal entries of an interrupted run that was asked for the same thing: of whole shards, and a begun one."""
        journal = self.partial / _JOURNAL
        if not self._resume or not journal.exists():
            return {}, None
        try:
            state = json.loads(journal.read_text())
            shards, digest = dict(state["shards"]), state["digest"]
            begun = dict(state["begun"]) if state.get("begun") else None
        except (OSError, ValueError, KeyError, TypeError):
            return {}, None  # a damaged journal vouches for nothing
        if digest != self._digest:
            raise OutputError(
                f"{self.partial} was begun with other options or from another source (if calibrated: or on another "
                "device, or with another number of threads); run the command that began it with --resume, or without "
                "--resume to start over."
            )
        self._goes_on = True
        return shards, begun

    def forget(self, file: str) -> None:
        """Drop a shard that turned out not to be whole."""
        self.finished.pop(file, None)
        (self.partial / file).unlink(missing_ok=True)
        self._write_journal()

    def record(self, file: str, entry: Any) -> None:
        """Enter a whole shard into the journal."""
        self.finished[file] = entry
        self.begun = None
        self._write_journal()

    def record_begun(self, entry: dict[str, Any] | None) -> None:
        """Enter the beginning of a shard (``file``, and whatever it takes to go on), or that there is none."""
        self.begun = entry
        self._write_journal()

    def _write_journal(self) -> None:
        state = {"digest": self._digest, "shards": self.finished, "begun": self.begun}
        fresh = self.partial / (_JOURNAL + ".new")
        write_synced(fresh, json.dumps(state).encode())
        fresh.replace(self.partial / _JOURNAL)

    def commit(self) -> None:
        """Give the folder its final name, replacing an earlier one in a single step where the system can.

        Raises:
            OutputError: something else took the name meanwhile.
        """
        old = None
        try:
            replacing = self.out.exists() and any(self.out.iterdir())
            if replacing:
                check_out(self.out, force=self._force)
            (self.partial / _JOURNAL).unlink()
            shutil.rmtree(self.calibrated, ignore_errors=True)
            _sync_folder(self.partial)
            if replacing:
                old = _exchange(self.partial, self.out)
            else:
                self.partial.rename(self.out)
        except OSError as error:
            (self.partial / _LOCK).unlink(
                missing_ok=True
            )  # without it, nobody takes the folder for leftovers
            raise OutputError(
                f"cannot rename {self.partial} to {self.out} ({error.strerror}); the converted model is whole "
                "and stays there under its temporary name."
            ) from None
        (self.out / _LOCK).unlink(missing_ok=True)
        _sync_folder(self.out.parent)
        if old is not None:
            # Under a name of its own: OUT.partial may be wanted by another run from now on.
            aside = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
            with suppress(OSError):
                old = old.rename(aside)
            _remove(old)


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an `out` that would be overwritten.

    Raises:
        OutputError: it exists and `force` is not given, or it is not something glmquant wrote.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder; choose another OUT.")
    if os.path.ismount(out):
        # It cannot be renamed to, which would come out only at the very end.
        raise OutputError(f"{out} is a mount point; choose a folder inside it, such as {out / 'model'}.")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out} exists; choose another OUT, or replace it with --force.")
    if not (out / REPORT).exists():
        raise OutputError(
            f"{out} exists and was not written by glmquant (it has no {REPORT}), so --force does not replace it; "
            "remove it yourself or choose another OUT."
        )
    foreign = _foreign(out)
    if foreign is not None:
        raise OutputError(
            f"{out} also holds {foreign}, which glmquant did not write and --force would delete; move it away first."
        )


def _foreign(out: Path) -> str | None:
    """A file in a folder of ours that its report does not list; None if there is none."""
    try:
        ours = set(json.loads((out / REPORT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    ours |= {REPORT, EVALUATION, _LOCK}
    if (out / CARD).is_file() and is_sealed((out / CARD).read_bytes()):
        ours.add(CARD)  # one that somebody has edited is theirs
    return next((p.name for p in sorted(out.iterdir()) if p.name not in ours), None)


def sealed(card: str) -> bytes:
    """A card with a last line by which `is_sealed` tells whether somebody has edited it."""
    text = card.encode()
    return text + _SEAL % hashlib.sha256(text).hexdigest().encode()


def is_sealed(card: bytes) -> bool:
    """Whether a card is as it was written."""
    text = card[: card.rfind(b"\n", 0, -1) + 1]
    return card == text + _SEAL % hashlib.sha256(text).hexdigest().encode()


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path.parent, error) from None


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file, in one step where there is one already.

    Raises:
        OutputError: it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    write_synced(fresh, data)
    try:
        fresh.replace(path)
    except OSError as error:
        raise write_error(path.parent, error) from None


def write_error(partial: Path, error: OSError, needed: int | None = None) -> OutputError:
    """What a failed write in the folder `partial` means; `needed` is what the whole conversion takes there."""
    if error.errno == errno.EFBIG:
        return OutputError(
            f"a file in {partial} would grow beyond what its file system (or `ulimit -f`) allows; "
            "use a smaller --max-shard-size or choose another OUT."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = f": the conversion needs {show_size(needed)} there" if needed is not None else ""
        return OutputError(
            f"no room left in {partial.parent}{size}. Free some space (or choose another OUT) "
            "and run the same command with --resume."
        )
    return OutputError(f"cannot write to {partial}: {error.strerror or error}.")


def _empty(folder: Path, keep: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder as far as possible; the lock file goes last, so that half of it is still known for ours."""
    with suppress(OSError):
        _empty(folder, keep={_LOCK})
    shutil.rmtree(folder, ignore_errors=True)


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
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    return aside
