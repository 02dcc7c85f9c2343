"""One product at a time: the shapes of ChatGLM3-6B and GLM-4-9B, few rows and many, by every way there is.

Weights are rotated, so that none is in the L2 cache, and all products of a shape are in one CUDA graph. Each result is
compared with the exact product of the same weights, and computed twice to see that it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glmquant import ops
from glmquant.ops import choice, humming
from glmquant.packing import pack_int32
from glmquant.quantizers import QUANTIZERS
from glmquant.scheme import Scheme

from . import timing

# query_key_value, dense, dense_h_to_4h and dense_4h_to_h of both models, [out, in]; then their heads.
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))
HEADS = ((65024, 4096), (151552, 4096))
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
_HEAD_ROWS = (1, 16)
_DTYPE = torch.bfloat16
SCHEMES = {
    "int4-g128": Scheme(4, 128, scale_dtype="bfloat16"),
    "int4-g32-asym": Scheme(4, 32, symmetric=False, scale_dtype="bfloat16"),
    "int8-g128": Scheme(8, 128, scale_dtype="bfloat16"),
}
_PEERS = ("int4-g128", "int8-g128")  # what humming-kernels is measured with
_COMPILERS = 8  # at a time


class Way(NamedTuple):
    """One way to compute it.

    Attributes:
        nbytes: of one weight with its scales.
        weights: copies of the weight.
        run: x and a weight -> product.
        exact: what the weight stands for, [out, in].
    """

    nbytes: int
    weights: list[Any]
    run: Callable[[Tensor, Any], Tensor]
    exact: Tensor


Make = Callable[[Tensor, int], Way]
"""Of a weight, and of the bytes that its copies are to have together."""


def measure(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Microseconds, GB/s of weights, and TFLOP/s, by shape, rows and way; ``failed`` where there are none.

    Args:
        dry: tiny shapes on a CPU, to see that the program works.
        folder: not used.
    """
    device = torch.device("cpu" if dry else "cuda")
    shapes = (
        {(128, 128): (1, 3, 20)} if dry else dict.fromkeys(SHAPES, ROWS) | dict.fromkeys(HEADS, _HEAD_ROWS)
    )
    nbytes = 1 << 12 if dry else 1 << 28
    pool = ThreadPoolExecutor(_COMPILERS)
    try:
        compiled = (
            {} if dry else {shape: _compiled(pool, device, shape, rows) for shape, rows in shapes.items()}
        )
        for ways in (_WAYS, {f"humming {name}": partial(_by_humming, compiled, name) for name in _PEERS}):
            for shape, rows in shapes.items():
                weight = (torch.randn(shape, device=device) * 0.02).to(_DTYPE)
                for name, make in ways.items():
                    yield from _measured(name, make, weight, nbytes, rows)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measured(
    name: str, make: Make, weight: Tensor, nbytes: int, rows: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    about = {"shape": list(weight.shape), "way": name}
    try:
        way = make(weight, nbytes)
        for m in rows:
            yield about | {"rows": m} | _figures(way, m)
    except Exception as error:  # such as that a package is missing; the other ways do not mind
        yield about | {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}


def _compiled(
    pool: ThreadPoolExecutor, device: torch.device, shape: tuple[int, int], rows: tuple[int, ...]
) -> list[Future[None]]:
    """humming-kernels' own, of which each takes ten seconds, compiled while others are measured."""

    def compile_(name: str, most: int) -> None:
        from humming.kernel.humming import HummingKernel

        scheme = SCHEMES[name]
        groups = scheme.groups(shape[1])
        layer, kernel = humming.prepared(device, _DTYPE, *shape, groups, scheme.bits, scheme.symmetric, most)
        HummingKernel.prepare_kernels(layer, None, kernel, device)

    steps = {humming.step(m) for m in rows}
    return [pool.submit(compile_, name, most) for name in _PEERS for most in sorted(steps)]


def _plain(weight: Tensor, nbytes: int) -> Way:
    size = weight.numel() * weight.element_size()
    return Way(size, list(timing.copies(weight, nbytes)), lambda x, w: functional.linear(x, w), weight)


def _packed(
    scheme: Scheme, run: Callable[..., Tensor], layout: ops.Layout | None, weight: Tensor, nbytes: int
) -> Way:
    """In the layout that is best for our own kernels where none is named."""
    quantized = QUANTIZERS["rtn"](weight, scheme)
    packed = ops.Weight(pack_int32(quantized.codes, scheme.bits), quantized.scale, quantized.zero_point)
    layout = layout or ops.best_layout(packed, scheme.bits, weight.shape[1])
    packed = ops.arranged(packed, layout, scheme.bits, weight.shape[1])
    tables = [t for t in (packed.scale, packed.zero_point) if t is not None]
    size = packed.packed.nbytes + sum(t.nbytes for t in tables)
    weights = [replace(packed, packed=words) for words in timing.copies(packed.packed, nbytes)]
    return Way(size, weights, partial(run, bits=scheme.bits), quantized.dequantize())


def _by_humming(
    compiled: dict[tuple[int, int], list[Future[None]]], name: str, weight: Tensor, nbytes: int
) -> Way:
    """Another's kernels, whether `ops` is to use them or not."""
    scheme, (n, k) = SCHEMES[name], weight.shape
    if why_not := humming.why_not(weight.device, scheme.bits, scheme.symmetric, _DTYPE):
        raise RuntimeError(why_not)
    for kernel in compiled[n, k]:
        kernel.result()
    return _packed(scheme, _humming, ops.Layout.HUMMING, weight, nbytes)


def _linear(x: Tensor, weight: ops.Weight, bits: int) -> Tensor:
    return ops.linear(x, weight.packed, weight.scale, weight.zero_point, None, bits)


def _humming(x: Tensor, weight: ops.Weight, bits: int) -> Tensor:
    return humming.linear(x, weight.packed, weight.scale, weight.zero_point, None, bits)


def _as_thudm(x: Tensor, weight: ops.Weight, bits: int) -> Tensor:
    """The whole weight in 16 bit, then an ordinary product."""
    whole = ops.dequantize(weight.packed, weight.scale, weight.zero_point, bits, x.shape[1], x.dtype)
    return functional.linear(x, whole)


def _bitsandbytes(weight: Tensor, nbytes: int) -> Way:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    exact = bnb.functional.dequantize_4bit(packed, state).float()
    size = packed.nbytes + state.absmax.nbytes
    weights = list(timing.copies(packed, nbytes))
    return Way(size, weights, lambda x, w: bnb.matmul_4bit(x, w.t(), state), exact)


_WAYS: dict[str, Make] = {
    "bf16": _plain,
    **{name: partial(_packed, scheme, _linear, None) for name, scheme in SCHEMES.items()},
    "thudm int4-g128": partial(_packed, SCHEMES["int4-g128"], _as_thudm, None),
    "bitsandbytes nf4": _bitsandbytes,
}


def _figures(way: Way, m: int) -> dict[str, Any]:
    n, k = way.exact.shape
    x = torch.randn(m, k, device=way.exact.device).to(_DTYPE)
    found = way.run(x, way.weights[0])
    exact = x.float() @ way.exact.float().t()
    again = way.run(x, way.weights[0])
    seconds = timing.graphed_seconds(lambda number: way.run(x, way.weights[number]), len(way.weights))
    row: dict[str, Any] = {
        "us": round(seconds * 1e6, 2),
        "GB/s": round(way.nbytes / seconds / 1e9, 1),
        "TFLOP/s": round(2 * m * n * k / seconds / 1e12, 2),
        "error": float(f"{(found.float() - exact).abs().max() / exact.abs().max():.2e}"),
        "same_again": torch.equal(found, again),
    }
    weight = way.weights[0]
    if isinstance(way.run, partial) and way.run.func is _linear:
        bits = way.run.keywords["bits"]
        request = ops.Request.of(x, weight.scale, weight.zero_point, bits, weight.layout)
        row["chosen"] = choice.choose(request).name
    return row
