"""Compiling the CUDA kernels: for every architecture, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from glmquant._cuda import SIGNATURES, binary, build, libraries, nvrtc
from glmquant._cuda.errors import UnavailableError
from glmquant._cuda.source import ARCHITECTURES, FLAGS, MAIN, digest, texts
from glmquant._folders import kernel_folder

SOURCE = kernel_folder("cuda") / MAIN
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
needs_nvrtc = pytest.mark.skipif(libraries.find("nvrtc") is None, reason="no NVRTC (nvidia-cuda-nvrtc)")

# What a thread may use, with some room, as compilers differ.
MOST_REGISTERS = {
    "glmquant_scales": 96,
    "glmquant_encode": 48,
    "glmquant_pack": 40,
    "glmquant_unpack": 40,
    "glmquant_dequantize": 64,
    "glmquant_errors": 48,
}


def nvcc(*options: str) -> str:
    """Compile; returns what the compiler said."""
    command = ["nvcc", *FLAGS, *options, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLMQUANT_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(architecture: int, tmp_path: Path) -> None:
    """No spills, no stack, no shared memory, few registers."""
    said = nvcc(f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "x"))
    assert "warning" not in said
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        said,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == set(SIGNATURES)
    for name, stack, stores, loads, registers, more in found:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= MOST_REGISTERS[name], name
        assert "smem" not in more, name


@needs_nvcc
def test_ptx_rounds_as_it_must_and_has_the_parameters_that_are_passed(tmp_path: Path) -> None:
    ptx = tmp_path / "kernels.ptx"
    nvcc("-arch=compute_75", "-ptx", "-o", str(ptx))
    text = ptx.read_text()
    # no contraction, no flushing of subnormals, no approximate division; no barrier and no shared memory either
    assert not re.findall(
        r"fma\.rn\.f32|mad\.f32|\.ftz|div\.full|div\.approx|rcp\.approx|bar\.sync|\.shared", text
    )
    assert "div.rn.f32" in text
    entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", text, re.DOTALL)
    letters = {".u64": ("p", "q"), ".s64": ("q",), ".u32": ("i",), ".s32": ("i",), ".f32": ("f",)}
    kinds = {name: re.findall(r"\.param (\.\w+)", parameters) for name, parameters in entries}
    assert set(kinds) == set(SIGNATURES)
    for name, found in kinds.items():
        assert len(found) == len(SIGNATURES[name]), name
        assert all(letter in letters[kind] for kind, letter in zip(found, SIGNATURES[name], strict=True)), (
            name
        )


@needs_nvcc
def test_one_file_for_every_architecture(tmp_path: Path) -> None:
    out = tmp_path / "glmquant.fatbin"
    subprocess.run(build.command(str(out)), check=True)
    assert out.stat().st_size > 100_000
    assert out.read_bytes()[:4] == b"\x50\xed\x55\xba"  # what cuModuleLoadData knows a fat binary by


def test_make_kernels_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.main() == 2
    assert "needs nvcc" in capsys.readouterr().err


# ---- NVRTC


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_on_first_use_and_kept(architecture: int, cache: Path) -> None:
    compiler = nvrtc.find()
    code = binary.compiled(architecture, compiler)
    assert code[:4] == b"\x7fELF"
    assert all(name.encode() in code for name in SIGNATURES)
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == code
    kept.write_bytes(b"what is kept is used")
    assert binary.compiled(architecture, compiler) == b"what is kept is used"


@needs_nvrtc
def test_a_gpu_newer_than_the_compiler_gets_ptx(cache: Path) -> None:
    compiler = nvrtc.find()
    newest = max(compiler.architectures())
    code = binary.compiled(newest + 50, compiler)
    assert f".target sm_{newest}".encode() in code
    assert code[-1] == 0  # the driver looks for the end of PTX


@needs_nvrtc
def test_a_gpu_older_than_the_compiler(cache: Path) -> None:
    with pytest.raises(UnavailableError, match=r"does not compile for compute capability 5\.0"):
        binary.compiled(50, nvrtc.find())


@needs_nvrtc
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("GLMQUANT_CACHE", str(file))
    assert binary.compiled(90, nvrtc.find())[:4] == b"\x7fELF"


@needs_nvrtc
def test_other_sources_are_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nvrtc.find()
    binary.compiled(90, compiler)
    changed = {**texts(), MAIN: "// changed\n" + texts()[MAIN]}
    monkeypatch.setattr("glmquant._cuda.source.texts", lambda: changed)
    binary.compiled(90, compiler)
    assert len(list(cache.iterdir())) == 2
    assert digest() != digest("another compiler")


@needs_nvrtc
def test_a_program_with_an_error() -> None:
    with pytest.raises(UnavailableError, match=r"could not compile the kernels \(x.cu\(2\): error: "):
        nvrtc.find().compile({"x.cu": "\nnonsense"}, "x.cu", ["--gpu-architecture=sm_90"])


@needs_nvrtc
def test_an_option_it_does_not_know() -> None:
    with pytest.raises(UnavailableError, match=r"NVRTC in .* failed \(NVRTC_ERROR_INVALID_OPTION"):
        nvrtc.find().compile({"x.cu": ""}, "x.cu", ["--no-such-option"])


def test_a_library_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "libnvrtc.so.13"
    file.write_text("no library")
    with pytest.raises(UnavailableError, match=r"libnvrtc.so.13 cannot be used"):
        nvrtc.Nvrtc(file)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_files", lambda: iter(()))
    with pytest.raises(UnavailableError, match="NVRTC was not found"):
        nvrtc.find()


# ---- Finding libraries


def test_libraries_by_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "libcuda.so.580.159.04", "libnvrtc-builtins.so.12.8", "libnvrtc.so.12", "libnvrtc.so.13",
        "libnvrtc.alt.so.13", "libcudart-9335f6a2.so.12", "libcublasLt.so.13", "libcublas.so.13",
    ]  # fmt: skip
    monkeypatch.setattr(libraries, "_files", lambda: (Path("/x") / name for name in names))
    assert libraries.find("cuda") == Path("/x/libcuda.so.580.159.04")
    assert libraries.find("nvrtc") == Path("/x/libnvrtc.so.12")
    assert libraries.find("nvrtc", "13") == Path("/x/libnvrtc.so.13")
    assert libraries.find("nvrtc", "11") == Path("/x/libnvrtc.so.12")
    assert libraries.find("cudart") == Path("/x/libcudart-9335f6a2.so.12")
    assert libraries.find("cublasLt") == Path("/x/libcublasLt.so.13")
    assert libraries.find("cufft") is None


def test_libraries_that_are_loaded_come_first() -> None:
    assert libraries.find("torch_cpu") == Path(torch.__file__).parent / "lib/libtorch_cpu.so"


# ---- Which code a GPU gets


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla P4")


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (6, 1))
    with pytest.raises(
        UnavailableError, match=r"Tesla P4 has compute capability 6\.1, and the kernels need 7\.5"
    ):
        binary.load(0)


def test_what_was_built_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(binary, "built_file", lambda: tmp_path / "built")
    (tmp_path / "built").write_bytes(b"all architectures")
    monkeypatch.setattr(nvrtc, "find", None)
    assert binary.load(0) == b"all architectures"


@needs_nvrtc
def test_compiled_where_nothing_was_built(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(binary, "built_file", lambda: tmp_path / "built")
    assert binary.load(0)[:4] == b"\x7fELF"
    assert next(cache.iterdir()).name.startswith("sm_86-")
