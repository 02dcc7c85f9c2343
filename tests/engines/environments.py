"""Virtual environments for engines: built once, kept in the cache, there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path
from shutil import rmtree

from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Say = Callable[[str], None]


class EnvironmentFailed(Exception):
    """An environment could not be built; the message says what was tried last and what pip said."""


@dataclass(frozen=True)
class Environment:
    """What is installed, in this order; any change gives another folder.

    Attributes:
        name: of the engine.
        first: installed before all else, and held fixed while the rest is resolved.
        package: the engine, installed without the dependencies it states.
        without: packages that it states and does not need for what is done here.
        besides: packages that it needs and does not state.
        beside_ours: it finds the packages of this environment as well, torch among them; nothing but `besides` is
            installed for it, whatever it states.
    """

    name: str
    first: tuple[str, ...]
    package: str
    without: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    beside_ours: bool = False

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        settings = asdict(self)
        if settings.pop("beside_ours"):
            settings["beside"] = sys.prefix
        identity = json.dumps([settings, sys.version_info[:2]], sort_keys=True)
        return cache() / f"{self.name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def ensure(self, say: Say) -> None:
        """Build it unless it is there.

        It is built under another name and renamed when whole. Only scripts in ``bin`` remember the first name; they
        are not used here, ``python -m`` is.

        Raises:
            EnvironmentFailed: pip could not install something; nothing is left behind.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        partial = self.folder.with_name(f".{self.folder.name}.partial")
        with FileLock(self.folder.with_name(f".{self.folder.name}.lock")):
            if self.folder.is_dir():
                return
            rmtree(partial, ignore_errors=True)  # of a run that was killed
            try:
                self._build(partial, say)
                partial.rename(self.folder)
            finally:
                rmtree(partial, ignore_errors=True)

    def version(self) -> str:
        """The installed version of the engine."""
        name = Requirement(self.package).name
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    def _build(self, folder: Path, say: Say) -> None:
        say(f"building an environment for {self.name} in {self.folder}; takes minutes, once")
        venv.create(folder, symlinks=True, with_pip=True)
        python = folder / "bin" / "python"
        held = folder / "held.txt"
        held.write_text("\n".join(self.first) + "\n")
        wheels = folder / "wheels"
        if self.first:
            say(f"  {', '.join(self.first)}")
            _pip(python, "install", *self.first)
        if self.beside_ours:
            places = {name: Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
            site = next((folder / "lib").glob("python*")) / "site-packages"
            (site / "ours.pth").write_text("".join(f"{place}\n" for place in sorted(set(places.values()))))
        say(f"  {self.package}, without what it depends on")
        kind = [] if self.beside_ours else ["--only-binary", ":all:"]
        _pip(python, "wheel", *kind, "--no-deps", "--wheel-dir", str(wheels), self.package)
        wheel = next(wheels.glob("*.whl"))
        _pip(python, "install", "--no-deps", str(wheel))
        needed = [*([] if self.beside_ours else self._needed(wheel)), *self.besides]
        say(f"  {len(needed)} packages that it needs{'' if self.beside_ours else ', and theirs'}")
        if needed:
            _pip(python, "install", *(["--no-deps"] if self.beside_ours else ["-c", str(held)]), *needed)
        rmtree(wheels)

    def _needed(self, wheel: Path) -> Iterator[str]:
        """What the wheel says it requires here, less what was installed first and what it can do without."""
        unwanted = {canonicalize_name(Requirement(name).name) for name in (*self.first, *self.without)}
        for stated in _requires(wheel):
            requirement = Requirement(stated)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and canonicalize_name(requirement.name) not in unwanted:
                requirement.marker = None
                yield str(requirement)


def cache() -> Path:
    """The folder of environments: outside the repository, shared by its clones."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GLMQUANT_CACHE") or Path(user_cache) / "glmquant").absolute() / "engines"


def _requires(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        raise EnvironmentFailed(f"pip {arguments[0]}: {errors[-1] if errors else pip.stderr.strip()[-500:]}")
