"""Where the sources of compiled kernels are, and where what is worth keeping between runs is kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def kernel_folder(kind: str) -> Path:
    """Sources for a `kind` of processor, ``cpu`` or ``cuda``. ``kernels`` lies beside the package's modules in a wheel,
    and beside the package in its repository.
    """
    package = Path(__file__).parent
    return next(f for f in (package / "kernels", package.parent / "kernels") if f.is_dir()) / kind


def cache_folder(kind: str) -> Path:
    """A folder that can be written, for things of a `kind`: below ``GLMQUANT_CACHE`` or the user's cache, or else a
    new temporary one.
    """
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
