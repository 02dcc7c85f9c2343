"""How a weight is quantized (`Scheme`), and a weight that has been (`QuantizedTensor`).

Algorithms and file formats meet only here. Codes are *unpacked and signed*, one int8 each: nibble order,
unsigned storage and interleaving are the business of `glmquant.formats` and nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .errors import QuantizationError, UsageError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

ScaleDType = Literal["float16", "bfloat16", "float32"]

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """Integer quantization of a matrix [out, in]: which grid, and how many columns share a scale.

    A weight is ``(code - zero_point) * scale`` with signed codes ``qmin..qmax``; the zero point is absent
    when `symmetric`.

    Args:
        bits: 4 or 8.
        group_size: columns that share one scale; None means the whole row.
        symmetric: no zero point.
        scale_dtype: the type in which a format stores scales. Scales are rounded to it *before* codes are
            computed, so that the codes are the best ones for the scale that a reader will see.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: ScaleDType = "float16"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"{self.bits} bits are not supported; use 4 or 8.")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise UsageError(f"group size {self.group_size} is not supported; use 32, 64, 128 or 'row'.")
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise UsageError(f"scales cannot be stored as {self.scale_dtype}.")

    @property
    def qmin(self) -> int:
        """Smallest signed code: -8 or -128."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest signed code: 7 or 127."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns` weights (which the group must divide)."""
        return 1 if self.group_size is None else columns // self.group_size

    def check_width(self, name: str, columns: int) -> None:
        """Raise `UsageError`, naming the groups that would work, if groups do not divide the rows of `name`."""
        if self.group_size is None or columns % self.group_size == 0:
            return
        fitting = [str(g) for g in GROUP_SIZES if columns % g == 0]
        advice = f"group sizes that do: {', '.join([*fitting, 'row'])}"
        raise UsageError(
            f"group size {self.group_size} does not divide the {columns} columns of {name}; {advice}."
        )

    def __str__(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group}{'' if self.symmetric else ' asym'}"

    def to_json(self) -> dict[str, Any]:
        """The scheme as plain JSON values, as plans and reports print it."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
        }

    def store_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Round float32 scales to the dtype in which they are stored.

        Raises:
            QuantizationError: a finite scale overflows that dtype (float16 holds at most 65504).
        """
        import torch

        stored = scale.to(getattr(torch, self.scale_dtype))
        if not bool(torch.isfinite(stored).all()):
            raise QuantizationError(
                f"a scale of {scale.abs().max().item():.4g} does not fit in {self.scale_dtype}"
            )
        return stored


@dataclass(frozen=True)
class QuantizedTensor:
    """Rows of a quantized matrix.

    Attributes:
        codes: int8 [rows, columns], within ``scheme.qmin..scheme.qmax``.
        scale: [rows, groups] in ``scheme.scale_dtype``; never NaN, 0 only where every code is the zero point,
            negative where the code range is used upside down (the extreme weight gets code ``qmin``).
        zero_point: int8 [rows, groups] on the same signed grid as the codes, or None when symmetric.
        scheme: how to read the above.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: Scheme

    def dequantize(self) -> torch.Tensor:
        """The weights these codes stand for, float32 [rows, columns]; the truth other code is tested against.

        The product of a code (at most 9 significant bits) and a half or bfloat16 scale (11) is exact in
        float32, so casting the result to half equals the half product that runtimes compute.
        """
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).float()
        if self.zero_point is not None:
            grouped -= self.zero_point.unsqueeze(-1).float()
        grouped *= self.scale.float().unsqueeze(-1)
        return grouped.view(rows, columns)

    def rows(self, start: int, stop: int) -> Self:
        """The same tensor cut to rows ``start..stop``."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero_point=zero_point,
        )
