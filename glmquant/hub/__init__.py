"""Where checkpoints come from. `resolve` turns what a user typed into something that can be opened."""

from __future__ import annotations

import os
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
    folder = Path(spelled).expanduser()
    if folder.is_dir():
        return Ref(spelled, folder)
    if folder.exists():
        raise SourceError(f"{spelled} is a file; pass the folder that holds config.json and the weights.")
    raise SourceError(
        f"{spelled} is not a folder on this machine. Downloading is not part of this version yet: fetch the "
        f"model first (for example `hf download {spelled.removeprefix('hf:').removeprefix('ms:')} "
        "--local-dir MODEL`) and pass that folder."
    )
