"""K-quants: llama.cpp's own ``llama-quantize`` turns the file in F16, once it is whole, into one of its mixed types.

Which matrix becomes what is its choice: attention values and half of the down projections get more bits than the rest,
and a matrix whose width is no multiple of 256 falls back to blocks of 32. Whatever it writes is read back and held
against the file it was given, weight by weight, before it takes that file's place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QuantizationError, UsageError, VerificationError
from .base import Rewritten

if TYPE_CHECKING:
    from ..checkpoint.gguf import GgufSource

K_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
PROGRAM = "GLMQUANT_LLAMA_QUANTIZE"
"""The environment variable that names the program where it is not on PATH."""
_BLOCK_WEIGHTS = 1 << 22


def llama_quantize(kind: str) -> str:
    """The program that makes `kind`.

    Raises:
        UsageError: it knows no such type, or there is no such program.
    """
    if kind not in K_TYPES:
        raise UsageError(f"llama-quantize is not asked for {kind!r} here; use {', '.join(K_TYPES)}.")
    named = os.environ.get(PROGRAM)
    found = shutil.which(named or "llama-quantize")
    if found is None and named:
        raise UsageError(f"{PROGRAM} names {named}, which is no program that can be run; correct it.")
    if found is None:
        raise UsageError(
            f"{kind} is made by llama.cpp's llama-quantize, which is not on PATH; install llama.cpp, or name the "
            f"program in {PROGRAM}, or use --gguf-type q4_0, which needs neither."
        )
    return found


def requantize(folder: Path, kind: str, threads: int) -> Rewritten:
    """Replace the GGUF file in `folder` by one of `kind`; ``config.json`` is there and says so already.

    Raises:
        QuantizationError: llama-quantize failed; the file is as it was.
        VerificationError: what it wrote is not the same model; the file is as it was.
    """
    from .._hashing import sha256
    from ..checkpoint.files import GGUF_FILE, WeightFiles
    from ..checkpoint.gguf import GgufSource

    plain, fresh = folder / GGUF_FILE, folder / f"{kind}.gguf"
    try:
        tool = _run(llama_quantize(kind), plain, fresh, kind, threads)
        before, after = (GgufSource(folder, WeightFiles((path.name,), None)) for path in (plain, fresh))
        entries = dict(_compared(before, after, kind))
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        digest = sha256(fresh)
        fresh.replace(plain)
    finally:
        fresh.unlink(missing_ok=True)
    return Rewritten(plain.name, plain.stat().st_size, digest, tool, entries)


def _run(program: str, plain: Path, fresh: Path, kind: str, threads: int) -> str:
    """Run it; returns what it calls itself."""
    command = [program, str(plain), str(fresh), kind.upper(), str(threads)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise QuantizationError(f"{program} cannot be run ({error.strerror or error}).") from None
    said = done.stdout.decode(errors="replace")
    if done.returncode or not fresh.is_file():
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise QuantizationError(
            f"llama-quantize ({program}) ended with status {done.returncode} and wrote no {kind}: "
            f"{lines[-1][:300] if lines else 'it said nothing'}."
        )
    build = re.search(r"build\s*[:=]\s*(\d+(?: \(\w+\))?)", said)
    return f"llama-quantize, build {build[1]}" if build else "llama-quantize"


def _compared(before: GgufSource, after: GgufSource, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The report's entries for the weights of `after` that are not those of `before` bit by bit."""
    import torch

    names = {name: info.shape for name, info in before.infos().items()}
    if names != {name: info.shape for name, info in after.infos().items()}:
        raise VerificationError(f"llama-quantize wrote other tensors for {kind} than it was given.")
    if not any(info.decoded for info in after.infos().values()):
        raise VerificationError(f"llama-quantize wrote a file for {kind} in which nothing is quantized.")
    for name, info in after.infos().items():
        step = max(1, _BLOCK_WEIGHTS // (info.shape[1] if len(info.shape) > 1 else 1))
        error = norm = 0.0
        for start in range(0, info.shape[0], step):
            exact = before.read(name, start, start + step).to(torch.float64)
            error += (after.read(name, start, start + step) - exact).square_().sum().item()
            norm += exact.square_().sum().item()
        relative = (error / norm) ** 0.5 if norm else 0.0
        if not relative < 1:  # also true of NaN
            raise VerificationError(
                f"llama-quantize wrote a {name} for {kind} that is not the weight it was given (relative error "
                f"{relative:.3f})."
            )
        if info.decoded is not None:
            yield name, {
                "bytes": info.nbytes, "scheme": info.decoded, "relative_error": float(f"{relative:.6g}"),
            }  # fmt: skip
        elif error:
            raise VerificationError(f"llama-quantize changed {name}, which it does not quantize in {kind}.")
