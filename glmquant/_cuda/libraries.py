"""Where CUDA's libraries are on this machine.

torch's wheels bring them in packages of their own, whose folders no loader searches.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path


def find(name: str, major: str | None = None) -> Path | None:
    """The file of the library `name`, for example ``cudart``: the one this process has loaded, or else the first of its
    wheel, torch and the CUDA toolkit that is there, preferably of the `major` version.
    """
    pattern = re.compile(rf"lib{name}(-[0-9a-f]{{8,}})?\.so(\.\d+)*")
    fitting = [path for path in _files() if pattern.fullmatch(path.name)]
    preferred = [path for path in fitting if f".so.{major}" in path.name]
    return next(iter(preferred or fitting), None)


def _files() -> Iterator[Path]:
    yield from _loaded()
    for folder in _folders():
        if folder.is_dir():
            yield from sorted(folder.glob("lib*.so*"), reverse=True)


def _loaded() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line[line.index("/") :] for line in lines if ".so" in line and "/" in line)
    return [Path(path) for path in paths]


def _folders() -> Iterator[Path]:
    for package, below in (("nvidia", "*/lib"), ("torch", "lib")):
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            yield from sorted(Path(place).glob(below), reverse=True)
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            yield Path(toolkit) / "lib64"
            yield Path(toolkit) / "lib"
