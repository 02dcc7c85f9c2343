"""One product at a time: the shapes of ChatGLM3-6B and GLM-4-9B, few rows and many, by every way there is.

Weights are rotated, so that none is in the L2 cache, and all products of a shape are in one CUDA graph. Each result is
compared with the exact product of the same weights, and computed twice to see that it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from glmquant import ops
from glmquant.ops import choice
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


class Way(NamedTuple):
    """One way to compute it.

    Attributes:
        name: for people.
        nbytes: of one weight with its scales.
        weights: copies of the weight.
        run: x and a weight -> product.
        exact: what the weight stands for, [out, in].
    """

    name: str
    nbytes: int
    weights: list[Any]
    run: Callable[[Tensor, Any], Tensor]
    exact: Tensor


def measure(dry: bool) -> dict[str, Any]:
    """Microseconds, GB/s of weights, and TFLOP/s, by shape, rows and way.

    Args:
        dry: tiny shapes on a CPU, to see that the program works.
    """
    device = torch.device("cpu" if dry else "cuda")
    shapes = (
        {(96, 128): (1, 3, 20)} if dry else dict.fromkeys(SHAPES, ROWS) | dict.fromkeys(HEADS, _HEAD_ROWS)
    )
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for shape, rows in shapes.items():
        for way in _ways(shape, device, failed, 1 << 12 if dry else 1 << 28):
            try:
                results += [_row(way, shape, m) for m in rows]
            except RuntimeError as error:
                if not way.name.startswith("bitsandbytes"):
                    raise
                failed[way.name] = str(error).partition("\n")[0]
    return {"triton": ops.layout_objection(device, 2, 1, 64), "failed": failed, "products": results}


def _ways(shape: tuple[int, int], device: torch.device, failed: dict[str, str], nbytes: int) -> Iterator[Way]:
    weight = (torch.randn(shape, device=device) * 0.02).to(_DTYPE)
    size = weight.numel() * weight.element_size()
    plain = list(timing.copies(weight, nbytes))
    yield Way("bf16", size, plain, lambda x, w: functional.linear(x, w), weight)
    del plain
    for name, scheme in SCHEMES.items():
        quantized = QUANTIZERS["rtn"](weight, scheme)
        packed = ops.Weight(pack_int32(quantized.codes, scheme.bits), quantized.scale, quantized.zero_point)
        layout = ops.best_layout(packed, scheme.bits, shape[1])
        packed = ops.arranged(packed, layout, scheme.bits, shape[1])
        tables = [t for t in (packed.scale, packed.zero_point) if t is not None]
        size = packed.packed.nbytes + sum(t.nbytes for t in tables)
        weights = [replace(packed, packed=words) for words in timing.copies(packed.packed, nbytes)]
        exact = quantized.dequantize()
        yield Way(name, size, weights, partial(_linear, bits=scheme.bits), exact)
        if name.startswith("int4-g128"):
            yield Way("thudm " + name, size, weights, partial(_as_thudm, bits=scheme.bits), exact)
    try:
        yield _bitsandbytes(weight, nbytes)
    except Exception as error:  # it is optional, and anything may be wrong with it
        failed["bitsandbytes nf4"] = f"{type(error).__name__}: {error}".partition("\n")[0]


def _linear(x: Tensor, weight: ops.Weight, bits: int) -> Tensor:
    return ops.linear(x, weight.packed, weight.scale, weight.zero_point, None, bits)


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
    return Way("bitsandbytes nf4", size, weights, lambda x, w: bnb.matmul_4bit(x, w.t(), state), exact)


def _row(way: Way, shape: tuple[int, int], m: int) -> dict[str, Any]:
    x = torch.randn(m, shape[1], device=way.exact.device).to(_DTYPE)
    found = way.run(x, way.weights[0])
    exact = x.float() @ way.exact.float().t()
    again = way.run(x, way.weights[0])
    seconds = timing.graphed_seconds(lambda number: way.run(x, way.weights[number]), len(way.weights))
    row = {
        "shape": shape,
        "rows": m,
        "way": way.name,
        "us": round(seconds * 1e6, 2),
        "GB/s": round(way.nbytes / seconds / 1e9, 1),
        "TFLOP/s": round(2 * m * shape[0] * shape[1] / seconds / 1e12, 2),
        "error": float(f"{(found.float() - exact).abs().max() / exact.abs().max():.2e}"),
        "same_again": torch.equal(found, again),
    }
    if isinstance(way.weights[0], ops.Weight) and not way.name.startswith("thudm"):
        weight, bits = way.weights[0], 8 if "int8" in way.name else 4
        request = ops.Request.of(x, weight.scale, weight.zero_point, bits, weight.layout)
        row["chosen"] = choice.choose(request).name
    return row
