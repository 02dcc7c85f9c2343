"""What a result was measured on and with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "glmquant", "torch", "triton", "safetensors", "compressed-tensors", "transformers", "numpy", "bitsandbytes",
    "torchao", "xllamacpp", "cpm_kernels", "humming-kernels",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Commit, hardware and versions, as plain JSON values."""
    return {"commit": _commit(), "hardware": _hardware(), "versions": _versions()}


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--", ".") else "")


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"flags\s*:\s*(.*)", text)
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "sha_ni")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": model[1] if model else platform.processor(),
        "flags": [f for f in wanted if flags and f in flags[1].split()],
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
    }
    return {**found, **_gpu()}


def _gpu() -> dict[str, Any]:
    """Name and driver as nvidia-smi has them; asking torch would take up memory of the GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    if not lines:
        return {}
    name, _, driver = lines[0].rpartition(", ")
    return {"gpu": name, "driver": driver, "gpus": len(lines)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
