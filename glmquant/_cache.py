"""The folder for what is worth keeping between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """A folder that can be written to: below ``GLMQUANT_CACHE`` or the user's cache, else one for this run alone."""
    named = os.environ.get("GLMQUANT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else (Path(shared) if shared else Path.home() / ".cache") / "glmquant"
        folder = folder / kind
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix=f"glmquant-{kind}-"))
