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
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module", params=[80, 90, 120], ids=lambda arch: f"sm_{arch}")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the compiler says of each kernel."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(HERE.parent),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "helpers_triton_build.py"), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_they_fit(built: Any) -> None:
    for name, found in built.items():
        assert found["spilled"] == 0, name
        assert found["registers"] <= 168, name
        assert found["shared"] <= found["shared_limit"], name


def test_products_never_wait_for_memory_in_their_loop(built: Any) -> None:
    """Weights, activations, scales and zero points are copied ahead; integers become floats without conversions.

    One load fewer is left to another Triton, which may choose otherwise for the smallest of them.
    """
    for name, found in built.items():
        if name.startswith("int"):
            assert found["waits"] <= 1, name
            assert found["ahead"] >= 2 + ("asymmetric" in name), name
            assert found["conversions"] <= 32, name
