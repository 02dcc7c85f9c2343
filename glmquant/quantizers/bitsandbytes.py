"""bitsandbytes' own rounding, by the library itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..scheme import Nested, QuantizedTensor, Scheme
from .grid import absmax

# Weights that the library is given at a time: it makes float32 copies.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class BitsandbytesOwn:
    """nf4 in blocks of 64, or int8 by rows; weights that are not half are rounded to half first, as int8 demands."""

    def __call__(
        self, weight: torch.Tensor, scheme: Scheme, statistics: torch.Tensor | None = None
    ) -> QuantizedTensor:
        """See `Quantizer`."""
        from ..formats.bitsandbytes import library

        functional = library()
        absmax(weight, scheme)  # refuses NaN and Inf
        half = weight.to(torch.float16)
        absmax(half, scheme)  # and what is beyond half
        codes, scales = [], []
        for rows in half.split(max(1, _AT_ONCE // half.shape[1])):  # type: ignore[no-untyped-call]
            if scheme.bits == 8:
                quantized, largest, _ = functional.int8_vectorwise_quant(rows)
                codes.append(quantized)
                scales.append(largest.view(-1, 1) / 127)
                continue
            packed, state = functional.quantize_4bit(rows, blocksize=scheme.group_size, quant_type="nf4")
            halves = torch.cat([packed >> 4, packed & 0xF], 1)
            codes.append((halves.view(torch.int8) - 8).view(rows.shape))
            scales.append(state.absmax.view(len(rows), -1))
        scale = torch.cat(scales)
        nested = _nested(functional, scale) if scheme.double else None
        if nested is not None:
            scale = nested.scales().view(scale.shape)
        return QuantizedTensor(torch.cat(codes), scale, None, scheme, nested=nested)


def _nested(functional: object, scale: torch.Tensor) -> Nested:
    offset = scale.mean()
    codes, state = functional.quantize_blockwise(scale.view(-1) - offset, blocksize=256)  # type: ignore[attr-defined]
    return Nested(codes, state.absmax, state.code, offset.item())
