"""The Triton kernels as machine code for real GPUs: that they compile, fit, and read ahead."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have."""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module", params=SHARED, ids=lambda arch: f"sm_{arch}")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    """Architecture, and what the compiler says of each kernel."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(HERE.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "helpers_triton_build.py"), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads(done.stdout.splitlines()[-1])[str(request.param)]


def test_they_fit(built: tuple[int, Any]) -> None:
    arch, kernels = built
    for name, found in kernels.items():
        assert found["spilled"] == 0, name
        assert found["registers"] <= 168, name
        assert found["shared"] <= SHARED[arch], name


def test_products_never_wait_for_memory_in_their_loop(built: tuple[int, Any]) -> None:
    """Weights, activations, scales and zero points are all copied ahead; and integers become floats without conversions."""
    for name, found in built[1].items():
        if name.startswith("int"):
            assert found["waits"] == 0, name
            assert found["ahead"] >= 3 + ("asymmetric" in name), name
            assert found["conversions"] <= 32, name
