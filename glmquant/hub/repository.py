"""A model repository on a hub, pinned to one commit: what both hubs have in common."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .._hashing import sha256
from ..errors import HubError, OutputError, UnsafeFileError
from .refs import Ref

OnBytes = Callable[[int], None]
"""Called with the bytes that came just now; may raise to stop."""

# Beyond this a listing is wrong, and the arithmetic of disk space pointless.
_LARGEST = 1 << 50
_LONGEST_NAME = 255


class Stopped(BaseException):
    """Raised out of `OnBytes` to end a download: no client takes it for a failure that is worth another try."""


@dataclass(frozen=True)
class RemoteFile:
    r"""A file as the hub lists it; one of the hashes is known.

    Attributes:
        sha256: of the content.
        blob_id: git's: SHA-1 of ``blob <size>\0`` and the content.
    """

    name: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    def matches(self, path: Path) -> bool:
        """Whether a file is this one, by size and hash."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256(path) == self.sha256
        if self.blob_id is None:
            return True
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        digest.update(path.read_bytes())
        return digest.hexdigest() == self.blob_id


class Repository(ABC):
    """A repository at one commit.

    Attributes:
        ref: as it was asked for.
        endpoint: the hub's address.
        commit: what the revision was when it was looked up.
        files: by name, as listed.
        advice: how to go on after what was not the user's fault; ends a sentence.
    """

    def __init__(self, ref: Ref, endpoint: str) -> None:
        self.ref, self.endpoint = ref, endpoint
        self.commit = ""
        self.files: Mapping[str, RemoteFile] = {}
        self._whole: dict[Path, tuple[RemoteFile, int, bool]] = {}
        self.advice = "run the same command again"

    def note_kept(self) -> None:
        """From now on what is fetched stays, in the client's cache or in a folder."""
        self.advice = "run the same command again to go on: what has been fetched is kept"

    @property
    @abstractmethod
    def cache(self) -> Path:
        """The client's cache."""

    @abstractmethod
    def cached(self, name: str) -> Path | None:
        """Where the client's cache holds a whole file."""

    def is_whole(self, name: str, path: Path) -> bool:
        """Whether the file at `path` is the one that the hub lists; what has not been written since is hashed once."""
        file, written = self.files[name], path.stat().st_mtime_ns
        known = self._whole.get(path)
        if known is None or known[:2] != (file, written):
            known = self._whole[path] = (file, written, file.matches(path))
        return known[2]

    def refuse_to_replace(self, names: Iterable[str], folder: Path) -> None:
        """Refuse to download over files of somebody's own.

        Raises:
            OutputError: `folder` holds other content than the hub under one of `names`.
        """
        for name in names:
            path = folder / name
            if path.is_symlink():  # the link goes, what it points to stays
                continue
            if path.exists() and not (path.is_file() and self.is_whole(name, path)):
                raise OutputError(
                    f"{path} is there already and is not the {name} of {self.ref}; move it away, leave the file out "
                    f"with --exclude {name}, or choose another --local-dir. Nothing was downloaded."
                )

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start..stop`` of a file.

        Raises:
            HubError: the hub does not give them.
        """

    @abstractmethod
    def _fetch(self, name: str, folder: Path | None, again: bool, on_bytes: OnBytes | None) -> Path:
        """Have the client download a file, into its cache or into `folder`; `again` discards what is there."""

    def fetch(self, name: str, folder: Path | None = None, on_bytes: OnBytes | None = None) -> Path:
        """Download a file, resuming what an earlier run left, and check its size and hash.

        Args:
            name: one of `files`.
            folder: where to put it; None is the cache of the hub's own client.
            on_bytes: see `OnBytes`.

        Raises:
            HubError: the hub does not give it, or twice something else than it lists.
        """
        return self.checked(name, folder, self.fetch_unchecked(name, folder, on_bytes), on_bytes)

    def fetch_unchecked(self, name: str, folder: Path | None, on_bytes: OnBytes | None) -> Path:
        """The first half of `fetch`: download; a whole file that is there already is taken as it is."""
        if folder is not None and (folder / name).is_file():
            if on_bytes is not None:
                on_bytes(self.files[name].size)
            return folder / name
        return self._anew(name, folder, False, on_bytes)

    def checked(self, name: str, folder: Path | None, path: Path, on_bytes: OnBytes | None) -> Path:
        """The second half: `path`, or the file downloaded once more where it is not the one that is listed."""
        file = self.files[name]
        if not self.is_whole(name, path):
            path = self._anew(name, folder, True, on_bytes)
            if not file.matches(path):
                _remove(path)
                raise HubError(
                    f"{name} of {self.ref} came twice with another content than {self.endpoint} lists; it was removed. "
                    "Try again later, or another mirror."
                )
        return path

    def _anew(self, name: str, folder: Path | None, again: bool, on_bytes: OnBytes | None) -> Path:
        for part in () if folder is None else (folder / name, folder / f"{name}.incomplete"):
            if part.is_symlink():  # nothing is written to where it points
                part.unlink()
        return self._fetch(name, folder, again, on_bytes)

    def small_file(self, name: str) -> Path:
        """A file in the client's cache, downloaded if it has to be."""
        return self.cached(name) or self.fetch(name)


def bytes_begun(path: Path) -> int:
    """What an interrupted download into a folder has left of the file `path`, as far as it takes room on the disk."""
    part = path.with_name(f"{path.name}.incomplete")
    if part.is_symlink() or not part.is_file():
        return 0
    found = part.stat()
    return min(found.st_size, 512 * found.st_blocks)


def check_name(name: str, where: object, consequence: str = "nothing of it was downloaded") -> None:
    """Refuse file names that lead out of a folder, or that no honest repository has; `where` lists it.

    Raises:
        UnsafeFileError: it is one of those.
    """
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or {"..", "."} & set(name.split("/"))
        or "\\" in name
        or ":" in name
        or not name.isprintable()
        or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts)
    ):
        raise UnsafeFileError(f"{where} lists a file called {name!r}; {consequence}.")


def check_size(size: object, name: str, ref: Ref) -> int:
    """A size as a listing states it.

    Raises:
        HubError: no file has that size.
    """
    if not isinstance(size, int) or not 0 <= size <= _LARGEST:
        raise HubError(f"{ref} lists {name!r} with a size of {size!r}; the hub or a mirror of it is broken.")
    return size


def _remove(path: Path) -> None:
    target = path.resolve()
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)  # in caches of Hugging Face the first is a link to the second
