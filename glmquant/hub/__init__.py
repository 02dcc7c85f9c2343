"""Where checkpoints come from. `resolve` turns what a user typed into something that can be opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError


@dataclass(frozen=True)
class Ref:
    """A resolved source: today always a local folder."""

    text: str
    folder: Path


def resolve(text: str | os.PathLike[str]) -> Ref:
    """Resolve a source reference.

    Raises:
        SourceError: it is not a folder on this machine.
    """
    spelled = os.fspath(text)
    try:
        folder = Path(spelled).expanduser()
    except RuntimeError:  # ~name of a user that does not exist
        folder = Path(spelled)
    if spelled and folder.is_dir():
        return Ref(spelled, folder)
    if spelled and folder.exists():
        raise SourceError(f"{spelled} is a file; pass the folder that holds config.json and the weights.")
    hub, _, name = spelled.rpartition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) or name.startswith("."):
        raise SourceError(
            f"the folder {spelled!r} does not exist; pass one that holds config.json and the weights."
        )
    name, _, revision = name.partition("@")
    command = f"modelscope download --model {name}" if hub == "ms" else f"hf download {name}"
    at = f" --revision {revision}" if revision else ""
    target = "--local_dir" if hub == "ms" else "--local-dir"
    raise SourceError(
        f"{spelled} is not a folder on this machine. Downloading is not part of this version yet: fetch the model "
        f"first (for example `{command}{at} {target} MODEL`) and pass that folder."
    )
