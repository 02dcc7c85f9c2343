"""The compiled kernels against their torch twins: the same bytes, for everything a quantizer can be given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers_formats import QUICK, WEIGHT_KINDS, random_weight, write_chatglm2
from hypothesis import given
from hypothesis import strategies as st

import glmquant
from glmquant import _native
from glmquant._quantize import _squared_sums
from glmquant.errors import QuantizationError
from glmquant.packing import (
    pack_int32,
    pack_nibbles_high_first,
    unpack_int32,
    unpack_nibbles_high_first,
)
from glmquant.quantizers import QUANTIZERS, native
from glmquant.scheme import QuantizedTensor, Scheme

needs_kernels = pytest.mark.skipif(_native.library() is None, reason=f"no kernels: {_native.why_not()}")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@contextmanager
def torch_only() -> Iterator[None]:
    """As on a machine without a compiler."""
    before = _native._loaded
    _native._loaded = _native._Loaded(None, "a test")
    try:
        yield
    finally:
        _native._loaded = before


def assert_same(weight: torch.Tensor, scheme: Scheme, method: str) -> None:
    quantizer = QUANTIZERS[method]
    with torch_only():
        expected = quantizer(weight, scheme)
    found = quantizer(weight, scheme)
    assert torch.equal(found.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    assert torch.equal(found.codes, expected.codes)
    assert (found.zero_point is None) == (expected.zero_point is None)
    if expected.zero_point is not None:
        assert found.zero_point is not None
        assert torch.equal(found.zero_point, expected.zero_point)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_same_bytes(method: str, kind: str, bits: int, group: int | None, dtype: torch.dtype) -> None:
    weight = random_weight(kind, 24, 640).to(dtype)
    for symmetric in (True, False):
        for scale_dtype in ("float16", "bfloat16", "float32"):
            assert_same(weight, Scheme(bits, group, symmetric, scale_dtype), method)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_same_bytes_thudm(kind: str, bits: int) -> None:
    assert_same(random_weight(kind, 64, 640), Scheme(bits), "thudm")


@st.composite
def odd_weights(draw: st.DrawFn) -> tuple[torch.Tensor, Scheme, str]:
    """Any bit pattern that is finite, any width."""
    bits = draw(st.sampled_from([4, 8]))
    method = draw(st.sampled_from(["rtn", "mse", "thudm"]))
    dtype = torch.float16 if method == "thudm" else draw(st.sampled_from(DTYPES))
    group = None if method == "thudm" else draw(st.sampled_from([32, None]))
    symmetric = method == "thudm" or draw(st.booleans())
    width = draw(st.integers(1, 70)) if group is None else 32 * draw(st.integers(1, 3))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(whole)
    weight = torch.randint(limits.min, limits.max + 1, (4, width), generator=seed).to(whole).view(dtype)
    weight = torch.where(torch.isfinite(weight), weight, 0)
    if draw(st.booleans()):  # small exponents only, where scales are subnormal or 0
        weight = weight * 2.0 ** draw(st.integers(-24, -10))
    if draw(st.booleans()):
        weight[draw(st.integers(0, 3))] = 0
    scale_dtype = "float16" if method == "thudm" else draw(st.sampled_from(["bfloat16", "float32"]))
    return weight.to(dtype), Scheme(bits, group, symmetric, scale_dtype), method  # type: ignore[arg-type]


def refusal(weight: torch.Tensor, scheme: Scheme, method: str) -> str | None:
    try:
        QUANTIZERS[method](weight, scheme)
    except QuantizationError as error:
        return str(error)
    return None


@needs_kernels
@QUICK
@given(odd_weights())
def test_same_bytes_for_any_pattern(case: tuple[torch.Tensor, Scheme, str]) -> None:
    weight, scheme, method = case
    with torch_only():
        refused = refusal(weight, scheme, method)
    assert refusal(weight, scheme, method) == refused
    if refused is None:
        assert_same(weight, scheme, method)


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "mse", "thudm"])
def test_nan_and_infinity_are_named(method: str, value: float) -> None:
    weight = random_weight("gaussian", 8, 128)
    weight[3, 5] = value
    with pytest.raises(QuantizationError, match="NaN" if value != value else "infinite"):
        QUANTIZERS[method](weight, Scheme(4))


@needs_kernels
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_agree(dtype: torch.dtype, symmetric: bool) -> None:
    weight = random_weight("heavy-tail", 64, 512).to(dtype)
    for group in (32, None):
        found = QUANTIZERS["rtn"](weight, Scheme(4, group, symmetric))
        assert native.squared_sums(weight, found) == pytest.approx(_squared_sums(weight, found), rel=1e-12)


@needs_kernels
@pytest.mark.parametrize("columns", [8, 64, 4096])
def test_packing_agrees(columns: int) -> None:
    codes = torch.randint(-8, 8, (7, columns), dtype=torch.int8)
    with torch_only():
        low, high = pack_int32(codes, 4), pack_nibbles_high_first(codes)
    assert torch.equal(pack_int32(codes, 4), low)
    assert torch.equal(pack_nibbles_high_first(codes), high)
    assert torch.equal(unpack_int32(low, 4, columns), codes)
    assert torch.equal(unpack_nibbles_high_first(high), codes)


@needs_kernels
def test_every_byte_of_two_nibbles() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    with torch_only():
        low = unpack_int32(every.view(torch.int32).view(1, -1), 4, 512)
        high = unpack_nibbles_high_first(every.view(torch.int8).view(1, -1))
    assert torch.equal(unpack_int32(every.view(torch.int32).view(1, -1), 4, 512), low)
    assert torch.equal(unpack_nibbles_high_first(every.view(torch.int8).view(1, -1)), high)
    assert torch.equal(pack_nibbles_high_first(high).view(torch.uint8).flatten(), every)


def test_weights_that_a_kernel_cannot_take() -> None:
    weight = random_weight("gaussian", 8, 256)
    assert native.quantize(weight[:, ::2], Scheme(4), native.Method.NEAREST) is None
    assert native.quantize(weight[:0], Scheme(4), native.Method.NEAREST) is None
    assert isinstance(QUANTIZERS["rtn"](weight[:, ::2].contiguous(), Scheme(4)), QuantizedTensor)


@needs_kernels
@pytest.mark.parametrize(
    "recipe",
    [
        glmquant.Recipe(),
        glmquant.Recipe(symmetric=False, method="rtn", group_size=32),
        glmquant.Recipe(bits=8, quantize_head=True, quantize_embeddings=True),
        glmquant.Recipe(format="cpm"),
    ],
    ids=["int4", "asymmetric", "int8", "cpm"],
)
def test_same_folder(recipe: glmquant.Recipe, tmp_path: Path) -> None:
    """Down to the errors in the report."""
    write_chatglm2(tmp_path / "source")
    found = glmquant.convert(tmp_path / "source", tmp_path / "compiled", recipe)
    assert not found.hints
    with torch_only():
        slow = glmquant.convert(tmp_path / "source", tmp_path / "torch", recipe)
    assert slow.hints == ("worked without compiled kernels: a test.",)
    names = sorted(path.name for path in (tmp_path / "torch").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "compiled").iterdir())
    for name in names:
        assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


# ---- Building. Each in a process of its own: kernels are loaded once.

ASK = "from glmquant import _native; print(_native.library() is not None, '|', _native.why_not())"


def ask(tmp_path: Path, **environment: str) -> str:
    env = {**os.environ, "GLMQUANT_CACHE": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_kernels
def test_built_once(tmp_path: Path) -> None:
    assert ask(tmp_path) == "True | None"
    (made,) = (tmp_path / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert ask(tmp_path) == "True | None"
    assert made.stat().st_mtime_ns == before


@needs_kernels
def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    (tmp_path / "temporary").mkdir()
    found = ask(tmp_path, GLMQUANT_CACHE=str(file), TMPDIR=str(tmp_path / "temporary"))
    assert found == "True | None"
    assert not list((tmp_path / "temporary").iterdir())


def test_turned_off(tmp_path: Path) -> None:
    assert ask(tmp_path, GLMQUANT_NATIVE="0") == "False | GLMQUANT_NATIVE=0 turns the compiled kernels off"
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path: Path) -> None:
    said = ask(tmp_path, PATH=str(tmp_path), CXX="")
    assert said.startswith("False | no C++ compiler was found (install g++")


def test_compiler_that_fails(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert ask(tmp_path, CXX=str(broken)) == (
        f"False | {broken} could not build the CPU kernels (x.cpp:1: error: out of luck)"
    )
    assert not list((tmp_path / "native").iterdir())


def test_compiler_that_says_nothing(tmp_path: Path) -> None:
    silent = tmp_path / "silent-c++"
    silent.write_text("#!/bin/sh\nexit 7\n")
    silent.chmod(0o755)
    assert (
        ask(tmp_path, CXX=str(silent)) == f"False | {silent} could not build the CPU kernels (exit status 7)"
    )
