"""Where checkpoints come from: folders, Hugging Face, ModelScope.

Everything that goes over the network is done by the hubs' own clients, with their caches, logins and settings.
`resolve` says what a text refers to and asks nobody; `open_repository` looks a model up; `local_folder` has it on
this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HubError, UsageError
from .refs import HUB_NAMES, Ref, resolve

if TYPE_CHECKING:
    from .repository import Repository

__all__ = [
    "HUB_NAMES",
    "Download",
    "Ref",
    "download",
    "is_offline",
    "local_folder",
    "offline_folder",
    "open_repository",
    "resolve",
]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Download:
    """What was downloaded.

    Attributes:
        ref: as it was asked for.
        folder: where the files are.
        commit: what the revision was; None without a network.
        files: SHA-256 (None where the hub has none) by name.
        nbytes: of all files together.
    """

    ref: Ref
    folder: Path
    commit: str | None
    files: dict[str, str | None]
    nbytes: int


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE says that nobody is to be asked; it counts for both hubs."""
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def open_repository(ref: Ref, *, endpoint: str | None = None, token: str | None = None) -> Repository:
    """Look up a model on its hub.

    Raises:
        HubError: it is not there, or nobody answers.
    """
    try:
        if ref.hub == "ms":
            from .modelscope import ModelScope

            return ModelScope(ref, endpoint, token)
        from .huggingface import HuggingFace

        return HuggingFace(ref, endpoint, token)
    except HubError as error:
        if ref.text.startswith(f"{ref.hub}:"):
            raise
        # It may have been meant for a folder, and be misspelled.
        raise HubError(f"{ref.text} is not a folder on this machine, and {error}") from None


def local_folder(text: PathLike) -> Path:
    """The folder of a checkpoint on this machine; a model on a hub is downloaded into the hub's own cache.

    Raises:
        SourceError: there is no such folder.
        HubError: the hub does not give it.
    """
    ref = resolve(text)
    if ref.folder is not None:
        return ref.folder
    if is_offline():
        return offline_folder(ref)
    from .fetching import fetch_all, needed

    repository = open_repository(ref)
    return fetch_all(repository, needed(repository))


def offline_folder(ref: Ref) -> Path:
    """Where the hub's own cache holds a model.

    Raises:
        HubError: it does not.
    """
    if ref.hub == "ms":
        from .modelscope import offline_file

        path = offline_file(ref.name, "config.json", ref.revision)
    else:
        from .huggingface import cached_file

        path = cached_file(ref.name, "config.json", ref.revision or "main")
    if path is None:
        raise HubError(
            f"{ref.text} is not in the cache of {HUB_NAMES[ref.hub]}, and HF_HUB_OFFLINE forbids to ask for it; "
            f"run `glmquant download {ref}` where there is a network."
        )
    return path.parent


def download(
    text: PathLike,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    local_dir: PathLike | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Download:
    """Download what is needed of a model: configuration, tokenizer, weights in one form; no code.

    An interrupted download is taken up where it ended. Sizes and hashes are compared with what the hub lists.

    Args:
        text: ``hf:org/name@revision``, ``ms:org/name@revision`` or ``org/name``.
        include: patterns of the files to download instead of what is needed.
        exclude: patterns of files to leave out.
        local_dir: a folder of your own instead of the cache of the hub's client.
        endpoint: the hub's address, for a mirror.
        token: instead of the one that the client has stored.
        progress: called with bytes done, bytes in all, and the name of a file.

    Raises:
        HubError: the hub does not give what was asked for.
        UsageError: `text` is a folder.
    """
    ref = resolve(text)
    if ref.folder is not None:
        raise UsageError(
            f"{ref} is a folder on this machine; to download the model of that name, write hf:{ref}."
        )
    folder = Path(local_dir).expanduser() if local_dir is not None else None
    if is_offline():
        from ..checkpoint.files import find_weights

        found = offline_folder(ref)
        shards = find_weights(found).shards  # says what is missing
        return Download(
            ref, found, None, dict.fromkeys(shards), sum((found / s).stat().st_size for s in shards)
        )
    from .fetching import fetch_all, select

    repository = open_repository(ref, endpoint=endpoint, token=token)
    names = select(repository, include, exclude)
    place = fetch_all(repository, names, folder, check_cached=True, progress=progress)
    files = {name: repository.files[name].sha256 for name in names}
    return Download(ref, place, repository.commit, files, sum(repository.files[name].size for name in names))
