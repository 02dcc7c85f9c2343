"""Which files of a repository are needed, and fetching them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event, Lock

from ..checkpoint.files import BIN_INDEX, CARRIED, SAFETENSORS_FILE, SAFETENSORS_INDEX, find_weights
from ..checkpoint.output import CARD, EVALUATION, REPORT
from ..errors import OutputError, SourceError
from ..recipe import show_size
from .repository import OnBytes, Repository, Stopped, check_name

SIDECARS = (*CARRIED, CARD, EVALUATION, REPORT)
"""Files beside the weights that something here reads. None of them is code."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the file that is being worked on."""

_AT_ONCE = 4
_LARGEST_TEXT = 64 << 20


def fetch_description(repository: Repository) -> Path:
    """Fetch ``config.json`` and the index of the weights; returns the folder they are in."""
    for name in ("config.json", *_indexes(repository)):
        if name not in repository.files:
            raise SourceError(
                f"{repository.ref} has no {name}; it is not a model that transformers could load."
            )
        if repository.files[name].size > _LARGEST_TEXT:
            raise SourceError(
                f"{name} of {repository.ref} has {repository.files[name].size} bytes, which is absurd."
            )
        path = repository.small_file(name)
        if name == "config.json":
            folder = path.parent
    return folder


def _indexes(repository: Repository) -> list[str]:
    """The index that will be read: of safetensors rather than of ``.bin``."""
    if SAFETENSORS_INDEX in repository.files:
        return [SAFETENSORS_INDEX]
    return [BIN_INDEX] if BIN_INDEX in repository.files and SAFETENSORS_FILE not in repository.files else []


def fetch_sidecars(repository: Repository) -> None:
    """Fetch the small files beside the weights into the client's cache."""
    for name in sidecars(repository):
        repository.small_file(name)


def sidecars(repository: Repository) -> list[str]:
    """The files beside the weights that are needed.

    Raises:
        UnsafeFileError: one has a name that no honest file has.
    """
    return _matching(repository, SIDECARS, whole_name=True)


def needed(repository: Repository) -> list[str]:
    """Every file that is needed to run or to convert the model: configuration, tokenizer, weights in one form."""
    folder = fetch_description(repository)
    weights = find_weights(folder, repository.files)
    return ["config.json", *_indexes(repository), *sidecars(repository), *weights.shards]


def select(repository: Repository, include: Collection[str], exclude: Collection[str]) -> list[str]:
    """The files to download: those that match `include`, or the needed ones, less those that match `exclude`.

    Raises:
        SourceError: there are none.
        UnsafeFileError: one has a name that no honest file has.
    """
    names = _matching(repository, include) if include else needed(repository)
    chosen = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    if not chosen:
        raise SourceError(f"{repository.ref} holds no file that is asked for.")
    return chosen


def _matching(repository: Repository, patterns: Iterable[str], whole_name: bool = False) -> list[str]:
    found = [
        name
        for name in repository.files
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not (whole_name and re.search(r"^[^/]+/", name))
    ]
    for name in found:
        check_name(name, repository.ref)
    return sorted(found)


def fetch_all(
    repository: Repository,
    names: Iterable[str],
    folder: Path | None = None,
    *,
    check_cached: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Fetch files, several at once; returns the folder they are in.

    Args:
        repository: where from.
        names: which.
        folder: where to; None is the cache of the hub's own client.
        check_cached: compare the hashes of what is in the cache already, too.
        progress: see `Progress`.

    Raises:
        HubError: the hub does not give what it lists.
        OutputError: there is not enough room.
    """
    files = [repository.files[name] for name in names]
    here = {f.name for f in files if folder is None and repository.cached(f.name) is not None}
    # The place that is known to be there; what a client keeps of a broken download is not counted on.
    place = folder or repository.small_file("config.json").parent
    check_room(sum(f.size for f in files if f.name not in here and not (place / f.name).exists()), place)
    total = sum(file.size for file in files)
    lock, stop = Lock(), Event()
    done = 0

    def counter(name: str) -> OnBytes:
        def count(nbytes: int) -> None:
            nonlocal done
            if stop.is_set():
                raise Stopped
            with lock:
                done += nbytes
                if progress is not None:
                    progress(min(done, total), total, name)

        return count

    def fetch(name: str) -> Path:
        path = repository.cached(name) if name in here else None
        if path is not None:
            counter(name)(repository.files[name].size)
            if not check_cached or repository.files[name].matches(path):
                return path
        return repository.fetch(name, folder, counter(name))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="glmquant-download") as pool:
        try:
            paths = dict(zip((f.name for f in files), pool.map(fetch, (f.name for f in files)), strict=True))
        except BaseException:
            stop.set()
            raise
    if progress is not None:
        progress(total, total, "")
    first = next(iter(paths))
    return folder or paths[first].parents[first.count("/")]


def check_room(needed: int, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OutputError: saying how much is missing.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"the download needs {show_size(needed)} in {folder}, where only {show_size(free)} are free; free some "
            "space, or put it on another disk (--local-dir, HF_HUB_CACHE, MODELSCOPE_CACHE)."
        )
