"""The quantization methods by name."""

from __future__ import annotations

from ..errors import UsageError
from ..recipe import CALIBRATED
from .base import Quantizer
from .bitsandbytes import BitsandbytesOwn
from .gptq import Gptq
from .mse import LeastSquares
from .rtn import RoundToNearest
from .thudm import Thudm
from .weighted import Hqq, WeightedLeastSquares

__all__ = [
    "QUANTIZERS", "BitsandbytesOwn", "Gptq", "Hqq", "LeastSquares", "Quantizer", "RoundToNearest", "Thudm",
    "WeightedLeastSquares", "data_free", "get",
]  # fmt: skip

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": RoundToNearest(),
    "mse": LeastSquares(),
    "thudm": Thudm(),
    "bitsandbytes": BitsandbytesOwn(),
    "hqq": Hqq(),
    "weighted-mse": WeightedLeastSquares(),
    "gptq": Gptq(),
}


def get(name: str) -> Quantizer:
    """The quantizer called `name`; `UsageError` lists those there are."""
    try:
        return QUANTIZERS[name]
    except KeyError:
        raise UsageError(f"method {name!r} is not known; use {', '.join(QUANTIZERS)}.") from None


def data_free(name: str) -> Quantizer:
    """The quantizer called `name`, or the one that takes its place where nothing is known about inputs."""
    return get("mse" if name in CALIBRATED else name)
