"""Throughput of the kernels for quantizing, packing and unpacking, and of the copies that feed them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmquant import _cuda
from glmquant.ops import dequantize, triton
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


def bandwidth(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Copies in GB/s, bytes read and written both counted on the device, once between host and device."""
    if not dry:
        yield {"what": "the GPU"} | _gpu()
    block = torch.empty(1 << 20 if dry else 1 << 30, dtype=torch.uint8, device="cpu" if dry else "cuda")
    other = torch.empty_like(block)
    host = torch.empty(len(block) // 4, dtype=torch.uint8, pin_memory=not dry)
    part = block[: len(host)]
    for what, to, source, times in (
        ("device to device", other, block, 2), ("pinned to device", part, host, 1), ("device to pinned", host, part, 1),
    ):  # fmt: skip
        seconds = timing.seconds(lambda _, to=to, source=source: to.copy_(source, non_blocking=True), 1)  # type: ignore[misc]
        yield {"what": what, "GB/s": round(times * len(to) / seconds / 1e9, 1)}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "quantization_kernels": _cuda.why_not(torch.device("cuda")) or "work",
        "triton": triton.why_not(torch.device("cuda")) or "works",
    }


def kernels(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Milliseconds, and GB/s of the 16-bit weights that are read or written."""
    device = torch.device("cpu" if dry else "cuda")
    if not dry and (why_not := _cuda.why_not(device)):
        raise SystemExit(f"the kernels are off, as {why_not}")
    for shape in ((16, 128),) if dry else SHAPES:
        weights = timing.copies(
            (torch.randn(shape, device=device) * 0.02).half(), 1 << 12 if dry else 1 << 29
        )
        for name, (method, scheme) in SCHEMES.items():
            work = partial(_quantize, weights, QUANTIZERS[method], scheme)
            yield _row(name, shape, timing.seconds(work, len(weights)))
        for bits in (4, 8):
            quantized = QUANTIZERS["rtn"](weights[0], Scheme(bits, 128))
            packed = timing.copies(pack_int32(quantized.codes, bits), weights[0].nbytes * len(weights) // 4)
            unpack = partial(_dequantize, packed, quantized)
            yield _row(f"dequantize-int{bits}", shape, timing.seconds(unpack, len(packed)))


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
