"""cpm_kernels: importing it where that is hard, launching through it, and every way in which it cannot be used.

The libraries of a machine with a GPU are played by a shim whose ``cuLaunchKernel`` runs the kernel on the CPU. Each
test has a process of its own: cpm_kernels looks for its libraries once, while it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_cuda import needs_shim, shim_library

from glmquant import _cuda

pytestmark = needs_shim

HERE = Path(__file__).parent

# Of torch, nothing is needed to load the kernels but these functions, and a real one takes seconds to import.
PRETEND = """
import contextlib, os, sys, types
from pathlib import Path
if "REAL_TORCH" in os.environ:
    import torch
else:
    torch = sys.modules["torch"] = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace()
torch.cuda.is_available = lambda: True
torch.cuda.init = torch.cuda.synchronize = lambda *_: None
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.current_stream = lambda index=None: types.SimpleNamespace(cuda_stream=0)
torch.cuda.get_device_capability = lambda index: (9, 0)
from glmquant import _cuda
from glmquant._cuda import binary, launcher, libraries
binary.load = lambda index: b"machine code"
libraries.find = lambda name: Path(os.environ["SHIM"]) if name != os.environ.get("SHIM_LACKS") else None
gpu = types.SimpleNamespace(type="cuda", index=0)
"""

ASK = PRETEND + "print(_cuda.why_not(gpu))"

QUANTIZE = (
    PRETEND
    + """
environment = dict(os.environ)
found = _cuda.kernels(gpu)
assert found is not None, _cuda.why_not(gpu)
assert dict(os.environ) == environment and "CUDA_PATH" not in environment
assert "pkg_resources" not in sys.modules
_cuda.kernels = lambda device: found
from helpers_weights import random_weight
from glmquant.quantizers import QUANTIZERS, cuda, native
from glmquant.scheme import Scheme
scheme, weight = Scheme(4, 32), random_weight("gaussian", 64, 128)
mse = QUANTIZERS["mse"]
expected = mse(weight, scheme)
result = cuda.quantize(weight, scheme, native.Method.LEAST_SQUARES, mse._candidates(128, scheme))
print(torch.equal(result.codes, expected.codes), torch.equal(result.scale, expected.scale))
"""
)


def run(script: str, **environment: str) -> str:
    env = {**os.environ, "SHIM": str(shim_library()), "PYTHONPATH": str(HERE), **environment}
    env.pop("CUDA_PATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_launching_through_cpm_kernels() -> None:
    assert run(QUANTIZE, REAL_TORCH="1") == "True True"


def test_usable() -> None:
    assert run(ASK) == "None"


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("cudaGetDeviceCount", "cpm_kernels could not be imported (RuntimeError: CUDA Runtime Error: "),
        ("cudaDeviceGetAttribute", "cpm_kernels could not be imported (RuntimeError: CUDA Runtime Error: "),
        ("cudaFree", "cpm_kernels could not load the kernels (RuntimeError: CUDA Runtime Error: "),
        ("cublasLtCreate", "cpm_kernels could not load the kernels (RuntimeError: "),
        (
            "cuModuleLoadData",
            "cpm_kernels could not load the kernels (RuntimeError: CUDA Error: out of luck)",
        ),
    ],
)
def test_library_calls_that_fail(fails: str, said: str) -> None:
    answer = run(ASK, SHIM_FAILS=fails)
    assert answer.startswith(said)
    assert "\n" not in answer


def test_a_library_that_is_not_there() -> None:
    answer = run(ASK, SHIM_LACKS="cublasLt")
    assert (
        answer == "cpm_kernels could not load the kernels (RuntimeError: Library cublasLt is not initialized)"
    )


def test_not_installed() -> None:
    hide = "\nlauncher.importlib.util = types.SimpleNamespace(find_spec=lambda name: None)\n"
    assert run(PRETEND + hide + "print(_cuda.why_not(gpu))") == (
        "cpm_kernels is not installed (pip install cpm_kernels)"
    )


def test_nothing_of_a_failed_import_remains() -> None:
    script = ASK + "\nprint([name for name in sys.modules if name.startswith('cpm_kernels')])"
    assert run(script, SHIM_FAILS="cudaGetDeviceCount").endswith("\n[]")


def test_turned_off() -> None:
    assert run(ASK, GLMQUANT_CUDA="0") == "GLMQUANT_CUDA=0 turns the CUDA kernels off"


def test_another_pkg_resources_is_left_alone() -> None:
    script = PRETEND + "sys.modules['pkg_resources'] = mine = types.ModuleType('pkg_resources')\n"
    script += "print(_cuda.why_not(gpu)); print(sys.modules['pkg_resources'] is mine)"
    assert run(script).endswith("True")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    assert _cuda.kernels(torch.device("cuda", 0)) is None
    why = _cuda.why_not(torch.device("cuda", 0))
    assert why in ("torch sees no GPU", "this torch was built without CUDA")
    assert _cuda.why_not(torch.device("cpu")) == "the CUDA kernels are for NVIDIA GPUs"
