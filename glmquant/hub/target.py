"""A repository on a hub that a folder is published to, through the hub's own client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import SourceError, UsageError
from .refs import Ref, resolve
from .repository import RemoteFile


class Target(ABC):
    """A repository to write to.

    Attributes:
        ref: as it was asked for.
        endpoint: the hub's address.
    """

    def __init__(self, ref: Ref, endpoint: str) -> None:
        self.ref, self.endpoint = ref, endpoint

    @property
    @abstractmethod
    def page(self) -> str:
        """Where people look at it."""

    @abstractmethod
    def create(self, private: bool, licence: str | None) -> None:
        """Create it unless it is there.

        Raises:
            HubError: the hub does not let us.
        """

    @abstractmethod
    def is_private(self) -> bool:
        """Whether only some may see it."""

    @abstractmethod
    def files(self) -> Mapping[str, RemoteFile]:
        """What it holds now."""

    @abstractmethod
    def upload(self, folder: Path, names: Collection[str]) -> str:
        """Upload files of `folder`; returns the commit. What an earlier attempt has brought there is not sent again.

        Raises:
            HubError: the hub does not take them.
        """


def target_of(text: str) -> Ref:
    """What ``--to`` names.

    Raises:
        UsageError: it is no repository on a hub.
    """
    hub = text.partition(":")[0]
    try:
        ref = resolve(text) if hub in ("hf", "ms") else None
    except SourceError:
        ref = None
    if ref is None or ref.revision is not None:
        raise UsageError(
            f"--to {text} is no place to publish; write hf:org/name or ms:org/name, without a revision."
        )
    return ref


def open_target(ref: Ref, endpoint: str | None = None, token: str | None = None) -> Target:
    """Get ready to write; nobody is asked yet.

    Raises:
        HubError: there is no token to write with.
    """
    if ref.hub == "ms":
        from .modelscope_target import ModelScopeTarget

        return ModelScopeTarget(ref, endpoint, token)
    from .huggingface_target import HuggingFaceTarget

    return HuggingFaceTarget(ref, endpoint, token)
