"""NVRTC, CUDA's compiler as a library, which torch's CUDA wheels bring along."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import libraries
from .errors import UnavailableError

_COMPILATION = 6  # NVRTC_ERROR_COMPILATION


class Nvrtc:
    """The library at `path`.

    Raises:
        UnavailableError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # NVRTC asks for this one by its bare name, which no loader would find in a wheel's folder.
            for builtins in path.resolve().parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(str(path))
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"NVRTC in {path} cannot be used ({error})") from None
        self.version = f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        """Those it can compile for, such as 90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return list(found)

    def compile(self, sources: Mapping[str, str], main: str, options: Sequence[str]) -> bytes:
        """Machine code (or PTX, for an ``--gpu-architecture`` that starts with ``compute_``) of the program `main`.

        Args:
            sources: texts by the names under which they include each other.
            main: one of them.
            options: as nvcc has them.

        Raises:
            UnavailableError: with the compiler's first complaint.
        """
        library, program = self._library, ctypes.c_void_p()
        texts = [text.encode() for text in sources.values()]
        names = [name.encode() for name in sources]
        many = ctypes.c_char_p * len(sources)
        self._check(
            library.nvrtcCreateProgram(
                ctypes.byref(program),
                sources[main].encode(),
                main.encode(),
                len(sources),
                many(*texts),
                many(*names),
            )
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = library.nvrtcCompileProgram(program, len(options), flags)
            if status == _COMPILATION:
                log = self._get("ProgramLog", program).decode(errors="replace").rstrip("\0")
                line = next((line for line in log.splitlines() if "error" in line), log.partition("\n")[0])
                raise UnavailableError(f"NVRTC {self.version} could not compile the kernels ({line.strip()})")
            self._check(status)
            virtual = any(option.startswith("--gpu-architecture=compute_") for option in options)
            return self._get("PTX" if virtual else "CUBIN", program)
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            said = self._library.nvrtcGetErrorString(status).decode()
            raise UnavailableError(f"NVRTC in {self.path} failed ({said})")


def find(major: str | None = None) -> Nvrtc:
    """NVRTC on this machine, preferably of the `major` version.

    Raises:
        UnavailableError: there is none.
    """
    path = libraries.find("nvrtc", major)
    if path is None:
        raise UnavailableError("CUDA's compiler NVRTC was not found (pip install nvidia-cuda-nvrtc)")
    return Nvrtc(path)
