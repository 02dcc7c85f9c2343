"""The kernels as something that a driver loads: what ``make kernels`` built, or compiled on first use and kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .._folders import cache_folder, kernel_folder, settle
from . import nvrtc
from .errors import UnavailableError
from .source import ARCHITECTURES, FLAGS, MAIN, digest, texts

_OLDEST = ARCHITECTURES[0]


def load(index: int) -> bytes:
    """The kernels for GPU number `index`.

    Raises:
        UnavailableError: the GPU is too old, or there is neither a built file nor a compiler.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    architecture = 10 * major + minor
    if architecture < _OLDEST:
        raise UnavailableError(
            f"the GPU {torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and the kernels need "
            f"{_OLDEST // 10}.{_OLDEST % 10}"
        )
    built = built_file()
    if built.exists():
        return built.read_bytes()
    return compiled(architecture, nvrtc.find(str(torch.version.cuda).partition(".")[0]))


def built_file() -> Path:
    """Where ``make kernels`` puts the kernels for every architecture. The name changes with the sources, so that a file
    of other sources is never loaded.
    """
    return kernel_folder("cuda") / f"glmquant-{digest()}.fatbin"


def compiled(architecture: int, compiler: nvrtc.Nvrtc) -> bytes:
    """The kernels for one architecture (such as 90), from the cache if they are there.

    A GPU newer than the compiler gets PTX, which the driver compiles.
    """
    known = compiler.architectures()
    fitting = [number for number in known if number <= architecture]
    if not fitting:
        raise UnavailableError(
            f"NVRTC {compiler.version} does not compile for compute capability {architecture / 10}"
        )
    target = f"sm_{architecture}" if architecture in known else f"compute_{max(fitting)}"
    cache = cache_folder("cuda")
    path = cache / f"{target}-{digest(target, compiler.version, str(compiler.path.resolve()))}.bin"
    if path.exists():
        return path.read_bytes()
    code = compiler.compile(texts(), MAIN, [f"--gpu-architecture={target}", *FLAGS])
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / path.name
        made.write_bytes(code)
        settle(made, path)
    return code
