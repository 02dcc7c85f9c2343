"""Launching through cpm_kernels, and importing it where a plain ``import`` fails.

cpm_kernels 1.0.11 brings int8 kernels as machine code for GPUs up to sm_86, which are of no use here; what is used is
its launcher, which takes any machine code. Its import has three traps:

* it asks for the number of GPUs and raises where there is no driver: so torch is asked first;
* it needs ``pkg_resources``, which setuptools dropped in version 82: it gets the two functions that it calls;
* it looks for libraries by their unversioned names in ``$CUDA_PATH/lib64``, and so never finds those of torch's
  wheels: for the import it gets a folder of links with such names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import libraries
from .errors import UnavailableError

if TYPE_CHECKING:
    from . import Run

_LIBRARIES = ("cuda", "cudart", "cublasLt", "nvrtc")
_lock = threading.Lock()


def launcher(base: Any, index: int, code: bytes) -> Run:
    """What launches the kernels in `code` (machine code, a fat binary or PTX) on GPU number `index`, with the `base` of
    `import_base`.

    Raises:
        UnavailableError: cpm_kernels cannot be used, or the driver does not take the code.
    """
    import torch

    module = base.LazyKernelCModule(code)
    functions: dict[str, Any] = {}

    def run(name: str, blocks: int, threads: int, parameters: list[Any]) -> None:
        with torch.cuda.device(index):
            stream = torch.cuda.current_stream(index).cuda_stream
            function = functions.get(name) or functions.setdefault(name, base.KernelFunction(module, name))
            function((blocks, 1, 1), (threads, 1, 1), 0, stream, parameters)

    try:
        with torch.cuda.device(index):
            torch.cuda.synchronize(index)  # a context, which the driver wants before it loads anything
            module.get_module()
    except Exception as error:
        raise UnavailableError(f"cpm_kernels could not load the kernels ({_first_line(error)})") from None
    return run


def import_base() -> Any:
    """cpm_kernels' module with ``LazyKernelCModule`` and ``KernelFunction``.

    Raises:
        UnavailableError: whatever goes wrong, in one sentence.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            "torch sees no GPU" if torch.version.cuda else "this torch was built without CUDA"
        )
    torch.cuda.init()  # type: ignore[no-untyped-call]
    with _lock:
        if "cpm_kernels.kernels.base" in sys.modules:
            return sys.modules["cpm_kernels.kernels.base"]
        return _import()


def _import() -> Any:
    if importlib.util.find_spec("cpm_kernels") is None:
        raise UnavailableError("cpm_kernels is not installed (pip install cpm_kernels)")
    try:
        with _links() as folder, _environment("CUDA_PATH", str(folder)), _pkg_resources():
            return importlib.import_module("cpm_kernels.kernels.base")
    except Exception as error:  # of any kind: it runs library calls while it is imported
        for name in [name for name in sys.modules if name.partition(".")[0] == "cpm_kernels"]:
            del sys.modules[name]
        raise UnavailableError(f"cpm_kernels could not be imported ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def _links() -> Iterator[Path]:
    """A folder whose ``lib64`` has the libraries under the names that cpm_kernels looks for."""
    with tempfile.TemporaryDirectory(prefix="glmquant-cuda-") as folder:
        lib64 = Path(folder) / "lib64"
        lib64.mkdir()
        for name in _LIBRARIES:
            found = libraries.find(name)
            if found is not None:
                (lib64 / f"lib{name}.so").symlink_to(found)
        yield Path(folder)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """The two functions of ``pkg_resources`` that cpm_kernels calls, where the real one is gone."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    stub = types.ModuleType("pkg_resources")

    def file(module: str, name: str) -> Path:
        return Path(str(sys.modules[module].__file__)).parent / name

    stub.resource_exists = lambda module, name: file(module, name).exists()  # type: ignore[attr-defined]
    stub.resource_string = lambda module, name: file(module, name).read_bytes()  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stub
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
