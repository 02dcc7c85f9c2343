"""``--device``: the choice, what is said where it cannot be met, and the same bytes whoever quantizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers_convert import content
from helpers_cuda import kernels_on_cpu as kernels_on_cpu
from helpers_cuda import needs_shim
from helpers_formats import write_chatglm2
from torch import Tensor

import glmquant
from glmquant import Recipe, _cuda, _device
from glmquant._device import Gpu, find_gpu
from glmquant.cli import main
from glmquant.errors import UsageError
from glmquant.quantizers import cuda, native
from glmquant.scheme import QuantizedTensor, Scheme

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

RECIPES = {
    "int4": Recipe(),
    "asymmetric": Recipe(symmetric=False, group_size=32),
    "int8-rtn": Recipe(bits=8, group_size="row", method="rtn", quantize_head=True, quantize_embeddings=True),
    "cpm": Recipe(format="cpm"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "random"
    write_chatglm2(folder)
    return folder


class FakeGpu(Gpu):
    """A GPU whose memory is the CPU's, and short every third time."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls = 0

    def run(self, rows: Tensor, work: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor] | None:
        self.calls += 1
        if self.calls % 3 == 0:
            self.fallbacks += 1
            return None
        return work(rows)


@needs_shim
@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_same_folder(recipe: Recipe, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CUDA kernels, here and there by the CPU's, down to the errors in the report."""
    glmquant.convert(source, tmp_path / "cpu", recipe, device="cpu")
    gpu = FakeGpu()
    used = []

    def quantize(
        weight: Tensor, scheme: Scheme, method: native.Method, search: native.Search = native._NO_SEARCH
    ) -> QuantizedTensor | None:
        used.append(method)
        return cuda.quantize(weight, scheme, method, search)

    monkeypatch.setattr(_device, "find_gpu", lambda device: (gpu, None))
    monkeypatch.setattr(native, "quantize", quantize)
    monkeypatch.setattr(native, "squared_sums", cuda.squared_sums)
    done = glmquant.convert(source, tmp_path / "gpu", recipe, workers=1)
    assert len(used) >= gpu.calls > gpu.fallbacks > 0
    assert done.hints == (
        f"GPU memory was short {gpu.fallbacks} times; those rows were quantized on the CPU.",
    )
    found, expected = content(tmp_path / "gpu"), content(tmp_path / "cpu")
    assert [name for name in expected if found[name] != expected[name]] == []


def test_short_memory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())
    monkeypatch.setattr(Gpu, "_stream", lambda self: None)
    gpu = Gpu(torch.device("cuda", 0))

    def short(rows: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_upload", short)
    assert gpu.run(torch.zeros(2, 2), lambda rows: {}) is None
    assert gpu.fallbacks == 1

    def broken(rows: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "_upload", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        gpu.run(torch.zeros(2, 2), lambda rows: {})


@without_gpu
def test_cuda_without_a_gpu(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--device", "cuda"])
    assert done.exit_code == 2
    assert done.stderr.startswith("glmquant: there is nothing for --device cuda to run on: torch ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@without_gpu
def test_auto_without_a_gpu(source: Path, tmp_path: Path) -> None:
    assert find_gpu("auto") == (None, None)
    assert (
        glmquant.convert(source, tmp_path / "auto").hints
        == glmquant.convert(source, tmp_path / "cpu", device="cpu").hints
    )
    assert content(tmp_path / "auto") == content(tmp_path / "cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:0", ""])
def test_other_devices(device: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"device '{device}' is not known; use auto, cpu, cuda"):
        glmquant.convert(source, tmp_path / "out", device=device)


def test_a_gpu_that_cannot_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_cuda, "why_not", lambda device: "cpm_kernels is not installed")
    with pytest.raises(
        UsageError, match="--device cuda cannot work here: cpm_kernels is not installed; use --device cpu"
    ):
        glmquant.convert(source, tmp_path / "out", device="cuda")
    done = glmquant.convert(source, tmp_path / "out")
    assert "the GPU was not used: cpm_kernels is not installed." in done.hints
    # nothing to quantize, nothing to say
    assert not glmquant.convert(source, tmp_path / "plain", Recipe(bits=16)).hints
