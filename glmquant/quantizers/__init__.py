"""The quantization methods by name."""

from __future__ import annotations

from ..errors import UsageError
from ..recipe import CALIBRATED
from .awq import Scaled
from .base import Quantizer
from .bitsandbytes import BitsandbytesOwn
from .gptq import Gptq
from .mse import LeastSquares
from .rtn import RoundToNearest
from .thudm import Thudm
from .weighted import Hqq, WeightedLeastSquares

__all__ = [
    "QUANTIZERS", "BitsandbytesOwn", "Gptq", "Hqq", "LeastSquares", "Quantizer", "RoundToNearest", "Scaled",
    "Thudm", "WeightedLeastSquares", "data_free", "get",
]  # fmt: skip

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": RoundToNearest(),
    "mse": LeastSquares(),
    "thudm": Thudm(),
    "bitsandbytes": BitsandbytesOwn(),
    "hqq": Hqq(),
    "weighted-mse": WeightedLeastSquares(),
    "gptq": Gptq(),
    "awq": Scaled(WeightedLeastSquares(), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
    "awq-gptq": Scaled(Gptq(), (0.15, 0.3, 0.45)),
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
