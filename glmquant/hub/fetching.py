"""Which files of a repository are needed, and fetching them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event, Lock

from ..checkpoint.files import (
    BIN_INDEX,
    CARRIED,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    WeightFiles,
    find_weights,
)
from ..checkpoint.output import CARD, EVALUATION, REPORT
from ..errors import OutputError, SourceError
from ..recipe import show_size
from .repository import OnBytes, Repository, Stopped, bytes_begun, check_name

SIDECARS = (*CARRIED, CARD, EVALUATION, REPORT)
"""Files beside the weights that something here reads. None of them is code."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the file that is being worked on."""

_AT_ONCE = 4
_LARGEST_TEXT = 64 << 20
_LARGEST_SIDECARS = 1 << 30  # all together; the largest tokenizers have some ten megabytes


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


def find_remote_weights(repository: Repository, folder: Path) -> WeightFiles:
    """The files of weights of a repository whose description is in `folder`.

    Raises:
        SourceError: there are none, or not all that the index names.
        UnsafeFileError: one has a name that no honest file has.
    """
    weights = find_weights(folder, repository.files)
    for shard in weights.shards:
        check_name(shard, repository.ref)
    return weights


def fetch_sidecars(repository: Repository) -> None:
    """Fetch the small files beside the weights into the client's cache."""
    for name in sidecars(repository):
        repository.small_file(name)


def sidecars(repository: Repository) -> list[str]:
    """The files beside the weights that are needed.

    Raises:
        UnsafeFileError: one has a name that no honest file has.
        SourceError: they are too large to be what their names say.
    """
    names = _matching(repository, SIDECARS, whole_name=True)
    total = sum(repository.files[name].size for name in names)
    if total > _LARGEST_SIDECARS:
        largest = max(names, key=lambda name: repository.files[name].size)
        raise SourceError(
            f"{largest} of {repository.ref} has {show_size(repository.files[largest].size)}, and the files beside the "
            f"weights {show_size(total)} in all, which is absurd; nothing of them was downloaded."
        )
    return names


def needed(repository: Repository) -> list[str]:
    """Every file that is needed to run or to convert the model: configuration, tokenizer, weights in one form."""
    folder = fetch_description(repository)
    weights = find_remote_weights(repository, folder)
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
        OutputError: there is not enough room, or a file of somebody's own in the way.
    """
    repository.note_kept()
    files = [repository.files[name] for name in names]
    here = {f.name for f in files if folder is None and repository.cached(f.name) is not None}
    if folder is not None:
        repository.refuse_to_replace((f.name for f in files), folder)
        check_room(
            sum(f.size - bytes_begun(folder / f.name) for f in files if not (folder / f.name).exists()),
            folder,
        )
    else:
        # What the clients keep of a broken download in their caches is not counted on.
        check_room(sum(f.size for f in files if f.name not in here), repository.cache)
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
            if not check_cached or repository.is_whole(name, path):
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
