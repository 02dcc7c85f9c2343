"""A packed weight as the operators take it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Layout(Enum):
    """The order of codes, scales and zero points. A value is the number of dimensions that the codes have in it."""

    FILE = 2
    """See `glmquant.ops.linear`."""
    INTERLEAVED = 3
    """For Triton's kernels: `glmquant.ops.interleaved`."""
    HUMMING = 4
    """For humming-kernels: `glmquant.ops.humming`."""


@dataclass(frozen=True)
class Weight:
    """A packed weight in any layout."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def layout(self) -> Layout:
        """Which one it has."""
        return Layout(self.packed.dim())

    @property
    def groups(self) -> int:
        """In a row."""
        return self.scale.shape[1 if self.layout is Layout.FILE else 0]

    def rows(self, start: int, stop: int) -> Weight:
        """Some of its rows; not in humming's layout, where they do not lie together."""
        where = (slice(start, stop),) if self.layout is Layout.FILE else (slice(None), slice(start, stop))
        zero_point = None if self.zero_point is None else self.zero_point[where]
        return Weight(self.packed[start:stop], self.scale[where], zero_point)


def height(packed: Tensor) -> int:
    """Rows of the weight that has these codes."""
    return 64 * packed.shape[1] if packed.dim() == Layout.HUMMING.value else packed.shape[0]
