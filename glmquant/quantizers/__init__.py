"""The quantization methods by name."""

from __future__ import annotations

from ..errors import UsageError
from .base import Quantizer
from .bitsandbytes import BitsandbytesOwn
from .mse import LeastSquares
from .rtn import RoundToNearest
from .thudm import Thudm

__all__ = ["QUANTIZERS", "BitsandbytesOwn", "LeastSquares", "Quantizer", "RoundToNearest", "Thudm", "get"]

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": RoundToNearest(),
    "mse": LeastSquares(),
    "thudm": Thudm(),
    "bitsandbytes": BitsandbytesOwn(),
}


def get(name: str) -> Quantizer:
    """The quantizer called `name`; `UsageError` lists those there are."""
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise UsageError(f"method {name!r} is not known; use {', '.join(QUANTIZERS)}.") from None
