"""Where the sources of compiled kernels are, and where what is worth keeping between runs is kept."""

from __future__ import annotations

import functools
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
    temporary one, which this process keeps to and removes when it ends.
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
        return Path(_temporary(kind).name)


@functools.cache
def _temporary(kind: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"glmquant-{kind}-", ignore_cleanup_errors=True)


def settle(made: Path, path: Path) -> None:
    """Give a file its name, whole or not at all whoever else builds it, and whatever happens to the power."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.replace(path)
