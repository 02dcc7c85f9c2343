"""The compiled CPU kernels (``kernels/cpu``): built once with the machine's own C++ compiler, and kept in a cache.

They are five to ten times faster than the same work in torch, and give the same bytes. Without a compiler
everything is done with torch; `why_not` says so in a sentence. ``GLMQUANT_NATIVE=0`` turns them off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ._folders import cache_folder, kernel_folder, settle

# No contraction of a*b+c and no -ffast-math: roundings are part of what a kernel promises.
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# Tried in this order: everything this processor has, if the compiler can tell; and threads, if it can make any (the
# OpenMP library is then the one that torch has loaded).
_TUNINGS = (
    ("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp-simd"), ("-fopenmp-simd",), (),
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 600  # 18 s of work, for as many cores as there are sources

AMX_ROWS = 16
"""From more rows on, tiles that torch multiplies on AMX are faster than the kernels."""

# Result and arguments of every function: a pointer, an int, an int64, a float, or nothing.
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_int64, "f": ctypes.c_float, "": None}
_SIGNATURES = {
    "glmquant_quantize": ("i", "piqqqiiipqqqfippp"),
    "glmquant_errors": ("", "piqqqppipp"),
    "glmquant_gptq": ("", "ppppqqpppqffpppp"),
    "glmquant_linear": ("", "piqqpqqipiqppiip"),
    "glmquant_matmul": ("", "piqqpqqipiqppiip"),
    "glmquant_linear_16": ("", "piqqpqpp"),
    "glmquant_dequantize": ("", "pqqiqpiqppi"),
    "glmquant_rms_norm": ("", "pppiqqfp"),
    "glmquant_silu_product": ("", "piqqp"),
    "glmquant_rotate": ("", "piqqqqppqqpppqpp"),
    "glmquant_attend": ("", "piqqqqppqpppfp"),
    "glmquant_layers": ("", "ppppp"),
    "glmquant_pack_low_first": ("", "pqp"),
    "glmquant_unpack_low_first": ("", "pqp"),
    "glmquant_pack_high_first": ("", "pqp"),
    "glmquant_unpack_high_first": ("", "pqp"),
}


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    reason: str


_lock = threading.Lock()
_loaded: _Loaded | None = None


def library() -> ctypes.CDLL | None:
    """The kernels, built now if they have to be; None where that is impossible."""
    return _load().library


def why_not() -> str | None:
    """Why `library` is None, as a sentence without its full stop; None where it is not."""
    found = _load()
    return None if found.library is not None else found.reason


def expected() -> bool:
    """Whether there is a `library`, or, if that has not been tried yet, seems to be all that it takes."""
    if _loaded is not None:
        return _loaded.library is not None
    return os.environ.get("GLMQUANT_NATIVE") != "0" and _compiler() is not None


@functools.cache
def has_amx() -> bool:
    """Whether torch multiplies bfloat16 on AMX here, which needs no torch to be told."""
    return "amx_tile" in _processor()


def _load() -> _Loaded:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _find()
    return _loaded


def _find() -> _Loaded:
    if os.environ.get("GLMQUANT_NATIVE") == "0":
        return _Loaded(None, "GLMQUANT_NATIVE=0 turns the compiled kernels off")
    compiler = _compiler()
    if compiler is None:
        return _Loaded(None, "no C++ compiler was found (install g++ or clang++ to go five times as fast)")
    try:
        return _Loaded(_bind(_built(compiler)), "")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        status = (
            f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
        )
        said = getattr(error, "stderr", None) or str(status)
        line = next((line for line in said.splitlines() if "error" in line), said.strip().partition("\n")[0])
        return _Loaded(None, f"{compiler} could not build the CPU kernels ({line})")


def _compiler() -> str | None:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    return next((found for name in wanted if (found := shutil.which(name))), None)


def _built(compiler: str) -> Path:
    """The library made of ``kernels/cpu``, from the cache if it is there."""
    cache = cache_folder("native")
    program = Path(compiler).resolve()
    texts = [
        path.read_text() for path in sorted(kernel_folder("cpu").iterdir()) if path.suffix in (".cpp", ".h")
    ]
    key = [*texts, *_FLAGS, str(_TUNINGS), str(program), str(program.stat().st_mtime_ns), _processor()]
    path = cache / f"cpu-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / path.name
        for tuning in _TUNINGS:
            done = _compiled([compiler, *_FLAGS, *tuning], made)
            if done.returncode == 0:
                break
        done.check_returncode()
        settle(made, path)
    return path


def _compiled(command: list[str], made: Path) -> subprocess.CompletedProcess[str]:
    """Compile the sources at the same time, and link them; the first step that failed, or the last one."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )

    sources = sorted(kernel_folder("cpu").glob("*.cpp"))
    objects = [str(made.with_name(f"{source.stem}.o")) for source in sources]
    with ThreadPoolExecutor(len(sources)) as pool:
        steps = list(pool.map(lambda s, o: run("-c", "-o", o, str(s)), sources, objects))
    failed = next((step for step in steps if step.returncode), None)
    return failed or run("-shared", "-o", str(made), *objects)


def _processor() -> str:
    """What ``-march=native`` depends on: a home may be shared between different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        return "".join(sorted(set(told)))
    except OSError:
        return platform.machine() + platform.processor()


def _bind(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = _TYPES[result], [_TYPES[letter] for letter in arguments]
    return loaded
