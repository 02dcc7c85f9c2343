"""Throughput of the kernels for quantizing, packing and unpacking, and of the copies that feed them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glmquant import _cuda
from glmquant.ops import dequantize
from glmquant.packing import pack_int32
from glmquant.quantizers import QUANTIZERS, Quantizer
from glmquant.scheme import QuantizedTensor, Scheme

from . import timing

# query_key_value, dense, dense_h_to_4h and dense_4h_to_h of ChatGLM3-6B, [out, in]
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))
SCHEMES = {
    "mse-int4-g128": ("mse", Scheme(4, 128)),
    "mse-int4-g32-asym": ("mse", Scheme(4, 32, symmetric=False)),
    "mse-int4-row": ("mse", Scheme(4)),
    "mse-int8-g128": ("mse", Scheme(8, 128)),
    "rtn-int4-g128": ("rtn", Scheme(4, 128)),
    "thudm-int4-row": ("thudm", Scheme(4)),
    "thudm-int8-row": ("thudm", Scheme(8)),
}


def bandwidth() -> dict[str, float]:
    """Copies in GB/s, bytes read and written both counted on the device, once between host and device."""
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(block)
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    part = block[: len(pinned)]
    return {
        "device_to_device": round(2 * len(block) / timing.seconds(lambda _: other.copy_(block), 1) / 1e9, 1),
        "pinned_to_device": round(
            len(pinned) / timing.seconds(lambda _: part.copy_(pinned, non_blocking=True), 1) / 1e9, 1
        ),
        "device_to_pinned": round(
            len(pinned) / timing.seconds(lambda _: pinned.copy_(part, non_blocking=True), 1) / 1e9, 1
        ),
    }


def kernels() -> list[dict[str, Any]]:
    """Milliseconds, and GB/s of the 16-bit weights that are read or written."""
    why_not = _cuda.why_not(torch.device("cuda"))
    assert why_not is None, why_not
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        weights = timing.copies((torch.randn(shape, device="cuda") * 0.02).half())
        for name, (method, scheme) in SCHEMES.items():
            work = partial(_quantize, weights, QUANTIZERS[method], scheme)
            rows.append(_row(name, shape, timing.seconds(work, len(weights))))
        for bits in (4, 8):
            quantized = QUANTIZERS["rtn"](weights[0], Scheme(bits, 128))
            packed = timing.copies(pack_int32(quantized.codes, bits))
            unpack = partial(_dequantize, packed, quantized)
            rows.append(_row(f"dequantize-int{bits}", shape, timing.seconds(unpack, len(packed))))
    return rows


def _quantize(
    weights: Sequence[Tensor], quantizer: Quantizer, scheme: Scheme, number: int
) -> QuantizedTensor:
    return quantizer(weights[number], scheme)


def _dequantize(packed: Sequence[Tensor], quantized: QuantizedTensor, number: int) -> Tensor:
    columns, bits = quantized.codes.shape[1], quantized.scheme.bits
    return dequantize(packed[number], quantized.scale, None, bits, columns, torch.float16)


def _row(name: str, shape: tuple[int, int], seconds: float) -> dict[str, Any]:
    rate = 2 * shape[0] * shape[1] / seconds / 1e9
    return {"what": name, "shape": shape, "ms": round(seconds * 1e3, 4), "GB/s": round(rate, 1)}
