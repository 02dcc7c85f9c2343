"""What a user types for a checkpoint: a folder, or a model on a hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError

_NAME = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*"
_REMOTE = re.compile(rf"(?P<name>{_NAME})(@(?P<revision>[\w./-]+))?", re.ASCII)

HUB_NAMES = {"hf": "Hugging Face", "ms": "ModelScope"}

# The same models under their other names; only ever suggested. Those of THUDM are in the published configurations, the
# others could not be looked up where this was written.
_SAME = (
    ("hf:THUDM/chatglm-6b", "hf:zai-org/chatglm-6b", "ms:ZhipuAI/ChatGLM-6B"),
    ("hf:THUDM/chatglm2-6b", "hf:zai-org/chatglm2-6b", "ms:ZhipuAI/chatglm2-6b"),
    ("hf:THUDM/chatglm3-6b", "hf:zai-org/chatglm3-6b", "ms:ZhipuAI/chatglm3-6b"),
    ("hf:THUDM/chatglm3-6b-32k", "hf:zai-org/chatglm3-6b-32k", "ms:ZhipuAI/chatglm3-6b-32k"),
    ("hf:THUDM/glm-4-9b-chat", "hf:zai-org/glm-4-9b-chat", "ms:ZhipuAI/glm-4-9b-chat"),
)


@dataclass(frozen=True)
class Ref:
    """A checkpoint as it was asked for: either `folder` is set, or `hub` and `name`.

    Attributes:
        text: as it was typed.
        folder: on this machine.
        hub: ``hf`` or ``ms``.
        name: ``org/name``.
        revision: branch, tag or commit; None for the hub's default branch.
    """

    text: str
    folder: Path | None = None
    hub: str = ""
    name: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        if self.folder is not None:
            return self.text
        return f"{self.hub}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def note(self) -> str | None:
        """A sentence for whoever may have meant a published model and gets the folder of that name."""
        hidden = f"hf:{self.text.rstrip('/')}"
        if self.folder is None or not _same_as(hidden):
            return None
        return (
            f"{self.text} is a folder on this machine and was used; write {hidden} for the model on the hub."
        )

    @property
    def elsewhere(self) -> str:
        """Where else the model is published, as the end of a sentence; empty where that is not known."""
        others = _same_as(f"{self.hub}:{self.name}")
        return f"; the same model is {' and '.join(others)}" if others else ""


def _same_as(remote: str) -> list[str]:
    for names in _SAME:
        if remote.lower() in map(str.lower, names):
            return [name for name in names if name.lower() != remote.lower()]
    return []


def resolve(text: str | os.PathLike[str]) -> Ref:
    """Say what `text` refers to, without asking the network.

    ``hf:org/name@revision`` is a model on Hugging Face, ``ms:org/name@revision`` one on ModelScope; everything else is
    a folder if there is one of that name, else ``org/name`` is on Hugging Face.

    Raises:
        SourceError: it is none of these.
    """
    spelled = os.fspath(text)
    hub, colon, rest = spelled.partition(":")
    if colon and hub in HUB_NAMES:
        return _remote(spelled, hub, rest)
    try:
        folder = Path(spelled).expanduser()
    except RuntimeError:  # ~name of a user that does not exist
        folder = Path(spelled)
    try:
        if spelled and folder.is_dir():
            return Ref(spelled, folder)
        exists = bool(spelled) and folder.exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if exists:
        raise SourceError(f"{spelled} is a file; pass the folder that holds config.json and the weights.")
    if isinstance(text, str) and _REMOTE.fullmatch(spelled):
        return _remote(spelled, "hf", spelled)
    raise SourceError(
        f"the folder {spelled!r} does not exist; pass one that holds config.json and the weights, or a model on a hub "
        "(hf:org/name, ms:org/name)."
    )


def _remote(text: str, hub: str, rest: str) -> Ref:
    match = _REMOTE.fullmatch(rest)
    if match is None or ".." in rest:
        raise SourceError(
            f"{text!r} is not the name of a model; write {hub}:org/name or {hub}:org/name@revision."
        )
    return Ref(text, None, hub, match["name"], match["revision"])
