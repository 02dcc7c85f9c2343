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

Book = Literal["int", "nf4", "llm.int8"]
ScaleDType = Literal["float16", "bfloat16", "float32"]

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """Integer quantization of a matrix [out, in]: which grid, and how many columns share a scale.

    A weight is ``(code - zero_point) * scale`` with signed codes ``qmin..qmax``; the zero point is absent
    when `symmetric`. With `minimum` it is ``(code - qmin) * scale + minimum``.

    Args:
        bits: 4 or 8.
        group_size: columns that share one scale; None means the whole row.
        symmetric: no zero point.
        scale_dtype: the type in which a format stores scales. Scales are rounded to it *before* codes are
            computed, so that the codes are the best ones for the scale that a reader will see.
        minimum: an asymmetric group has its smallest weight, in the scale's dtype, and no zero point (GGUF's Q4_1).
        activations: bits to which a reader rounds what the weights are multiplied with, token by token; None leaves
            it as it is. Nothing about the weights depends on it.
        book: what codes stand for: themselves, or with ``nf4`` entries of `NF4`. ``llm.int8`` is ``int`` with scales
            that are stored as 127 times themselves, which not every scale survives.
        double: scales are themselves quantized, over the whole matrix (bitsandbytes' double quantization). They are
            rounded *after* codes are computed, as that library does it.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: ScaleDType = "float16"
    minimum: bool = False
    activations: int | None = None
    book: Book = "int"
    double: bool = False

    def __post_init__(self) -> None:
        if self.book == "nf4" and (self.bits, self.symmetric) != (4, True):
            raise UsageError("nf4 has 4 bits and no zero points.")
        if self.minimum and self.symmetric:
            raise UsageError("symmetric weights have no minimum.")
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

    @property
    def levels(self) -> tuple[float, ...] | None:
        """What is multiplied by a scale for the codes from `qmin` on; None where that is the code less its zero point.

        There are no kernels for such levels: `glmquant.ops.dequantize_levels` unpacks them.
        """
        if self.book == "nf4":
            return NF4
        return tuple(map(float, range(1 << self.bits))) if self.minimum else None

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns` weights (which the group must divide)."""
        return 1 if self.group_size is None else columns // self.group_size

    def holds(self, other: Scheme) -> bool:
        """Whether every weight on the grid of `other` is on this one too, but for the rounding of scales: codes can
        then be carried over instead of chosen anew.
        """
        if self.book != "int" or other.book == "nf4":
            return not self.double and replace(other, double=False) == self
        widths = (self.group_size, other.group_size)
        alike = widths[1] is None or (widths[0] is not None and widths[1] % widths[0] == 0)
        offset = other.symmetric or (not self.symmetric and self.minimum == other.minimum)
        # with a minimum, codes count from their smallest value: it must stay the same one
        return alike and offset and (self.bits == other.bits if self.minimum else self.bits >= other.bits)

    def keeps_scales(self, other: Scheme) -> bool:
        """Whether scales of `other` need no rounding here. (From bfloat16 to half, only tiny ones do.)"""
        same = self.scale_dtype in (other.scale_dtype, "float32")
        return same or (self.scale_dtype, other.scale_dtype) == ("float16", "bfloat16")

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
        if self.book == "nf4":
            return f"nf4 {group}{' double' if self.double else ''}"
        offset = "" if self.symmetric else " min" if self.minimum else " asym"
        return f"int{self.bits}{f'-a{self.activations}' if self.activations else ''} {group}{offset}"

    def to_json(self) -> dict[str, Any]:
        """The scheme as plain JSON values, as plans and reports print it."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
            **({"book": self.book, "double": self.double} if self.book != "int" else {}),
            **({"minimum": True} if self.minimum else {}),
            **({"activations": self.activations} if self.activations else {}),
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


# The 16 entries of 4-bit NormalFloat (Dettmers et al., QLoRA, 2023), as bitsandbytes stores them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Nested:
    """The scales of a whole matrix, quantized by a table of 256 numbers: ``table[code] * scale + offset``.

    Attributes:
        codes: uint8 [rows * groups].
        scale: float32 [ceil(rows * groups / 256)], one for each 256 codes.
        table: float32 [256].
        offset: the mean of the scales.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor
    offset: float

    def scales(self) -> torch.Tensor:
        """What they stand for, float32 [rows * groups]."""
        wide = self.scale.repeat_interleave(256)[: len(self.codes)]
        return self.table[self.codes.long()] * wide + self.offset


@dataclass(frozen=True)
class QuantizedTensor:
    """Rows of a quantized matrix.

    Attributes:
        codes: int8 [rows, columns], within ``scheme.qmin..scheme.qmax``.
        scale: [rows, groups] in ``scheme.scale_dtype``; never NaN, 0 only where every code is the zero point,
            negative where the code range is used upside down (the extreme weight gets code ``qmin``).
        zero_point: int8 [rows, groups] on the same signed grid as the codes, or None when symmetric.
        scheme: how to read the above.
        nested: how the scales are stored, with `Scheme.double`; `scale` is what that gives.
        minimum: the weight of code `qmin`, [rows, groups] in ``scheme.scale_dtype``, in place of a zero point: a
            weight is then ``(code - qmin) * scale + minimum``. None almost everywhere.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: Scheme
    minimum: torch.Tensor | None = None
    nested: Nested | None = None

    def dequantize(self) -> torch.Tensor:
        """The weights these codes stand for, float32 [rows, columns]; the truth other code is tested against.

        The product of a code (at most 9 significant bits) and a half or bfloat16 scale (11) is exact in
        float32, so casting the result to half equals the half product that runtimes compute.
        """
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).float()
        if self.scheme.book == "nf4":
            import torch

            book = torch.tensor(NF4, device=grouped.device)
            grouped = book[self.codes.long() - self.scheme.qmin].view(grouped.shape)
        if self.zero_point is not None:
            grouped -= self.zero_point.unsqueeze(-1).float()
        if self.minimum is not None:
            grouped -= self.scheme.qmin
        grouped *= self.scale.float().unsqueeze(-1)
        if self.minimum is not None:
            grouped += self.minimum.float().unsqueeze(-1)
        return grouped.view(rows, columns)

    def on_grid(self, scheme: Scheme) -> QuantizedTensor:
        """The same weights on the grid of `scheme`, which holds this one's (see `Scheme.holds`).

        Exact but for scales that the dtype of `scheme` cannot hold, which are rounded.

        Raises:
            QuantizationError: a scale overflows that dtype, or is no number.
        """
        if not bool(self.scale.isfinite().all()):
            raise QuantizationError("a scale of it is NaN or infinite")
        groups = scheme.groups(self.codes.shape[1])
        repeats = groups // self.scale.shape[1]
        scale = scheme.store_scale(self.scale.float()).repeat_interleave(repeats, 1)
        zero_point, minimum = self.zero_point, self.minimum
        if minimum is not None:
            minimum = scheme.store_scale(minimum.float()).repeat_interleave(repeats, 1)
        elif scheme.minimum:
            minimum = scheme.store_scale(scale.float() * scheme.qmin)
        elif zero_point is not None:
            zero_point = zero_point.repeat_interleave(repeats, 1)
        elif not scheme.symmetric:
            zero_point = self.codes.new_zeros(scale.shape)
        return QuantizedTensor(self.codes, scale, zero_point, scheme, minimum)

    def rows(self, start: int, stop: int) -> Self:
        """The same tensor cut to rows ``start..stop``."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero_point=cut(self.zero_point),
            minimum=cut(self.minimum),
        )
