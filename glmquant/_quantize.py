"""The work on one block of rows: quantize, encode, decode again, compare, measure.

Runs in worker threads, one torch thread each; blocks are small enough to stay in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ._device import Gpu
from ._folding import Folds
from .checkpoint.decoded import DecodedSource
from .checkpoint.source import TensorSource, torch_dtype
from .errors import GlmquantError, QuantizationError
from .families import Role
from .formats import Format, StoredWeight
from .plan import Item
from .quantizers import Quantizer, native
from .quantizers.grid import largest_magnitude
from .scheme import QuantizedTensor, Scheme

# Rows of a source tensor that are read, worked on and written together.
TASK_BYTES = 16 << 20
# Weights in one call of a quantizer: large enough to hide the cost of calling torch operations (some 2 us each),
# small enough for its float32 copies to stay in the caches.
_BLOCK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Task:
    """Rows ``start..stop`` of an item (relative to the item)."""

    item: Item
    start: int
    stop: int
    ready: QuantizedTensor | None = None
    """what these rows have been quantized to already, by calibration"""
    folds: Folds = field(default_factory=Folds)
    """scales that calibration has moved between layers"""

    @property
    def nbytes(self) -> int:
        """Bytes of the source that it reads."""
        return self.item.source_nbytes * (self.stop - self.start) // max(1, self.item.shape[0])


@dataclass
class TaskResult:
    """Stored rows by tensor name, and sums for the error of the tensor."""

    rows: dict[str, torch.Tensor]
    squared_error: float = 0.0
    squared_norm: float = 0.0


def tasks(item: Item, row_multiple: int) -> list[Task]:
    """Cut an item into tasks; depends on nothing but the item, so that results do not depend on workers."""
    rows = item.shape[0] if item.shape else 1
    step = max(1, TASK_BYTES * rows // max(1, item.source_nbytes))
    step = -(-step // row_multiple) * row_multiple
    return [Task(item, start, min(rows, start + step)) for start in range(0, rows, step)]


def run(
    task: Task, source: TensorSource, quantizer: Quantizer | None, fmt: Format, gpu: Gpu | None = None
) -> TaskResult:
    """Do one task, on the CPU where no GPU is given or its memory is short; the results are the same.

    Raises:
        QuantizationError: naming the tensor.
    """
    item = task.item
    with torch.inference_mode():
        place = (item.source, item.start + task.start, item.start + task.stop)
        try:
            if item.carried:
                assert item.scheme is not None
                assert isinstance(source, DecodedSource)
                return _carried(source.quantized(*place), item, item.scheme, fmt)
            rows = task.folds.apply(item.source, source.read(*place), place[1])
            if item.scheme is None:
                return TaskResult({item.name: _copied(rows, item)})
            assert quantizer is not None
            if task.ready is not None:
                result = TaskResult({})
                result.rows = _encoded(rows, task.ready, item, item.scheme, fmt, result)
                return result
            return _quantized(rows, item, item.scheme, quantizer, fmt, gpu)
        except QuantizationError as error:
            raise QuantizationError(
                f"{item.source} cannot be converted: {error} (rows {item.start + task.start} to "
                f"{item.start + task.stop - 1}); the checkpoint is damaged or diverged in training."
            ) from None


def _copied(rows: torch.Tensor, item: Item) -> torch.Tensor:
    copied = rows.to(torch_dtype(item.outputs[0].dtype))
    if item.role is not Role.BUFFER and not _all_finite(copied):
        if _all_finite(rows):
            raise QuantizationError(f"it holds values beyond the range of {item.outputs[0].dtype}")
        raise QuantizationError("it holds NaN or an infinite value")
    return copied


def _all_finite(tensor: torch.Tensor) -> bool:
    flat = tensor.reshape(1, -1)
    pieces = (flat[:, i : i + _BLOCK_WEIGHTS] for i in range(0, flat.shape[1], _BLOCK_WEIGHTS))
    return all(bool(torch.isfinite(largest_magnitude(piece))) for piece in pieces)


def _quantized(
    rows: torch.Tensor, item: Item, scheme: Scheme, quantizer: Quantizer, fmt: Format, gpu: Gpu | None
) -> TaskResult:
    if gpu is not None:
        result = TaskResult({})
        stored = gpu.run(rows, lambda block: _block(block, item, scheme, quantizer, fmt, result))
        if stored is not None:
            result.rows = stored
            return result
    step = max(1, _BLOCK_WEIGHTS // rows.shape[1])
    step = -(-step // fmt.row_multiple) * fmt.row_multiple
    result = TaskResult({})
    pieces: dict[str, list[torch.Tensor]] = {}
    for block in rows.split(step):  # type: ignore[no-untyped-call]
        for name, tensor in _block(block, item, scheme, quantizer, fmt, result).items():
            pieces.setdefault(name, []).append(tensor)
    result.rows = {name: torch.cat(parts, _axis(item, name)) for name, parts in pieces.items()}
    return result


def _carried(stored: QuantizedTensor, item: Item, scheme: Scheme, fmt: Format) -> TaskResult:
    """Codes as the source has them; what scales lose in another dtype counts as error."""
    carried = stored.on_grid(scheme)
    result = TaskResult({})
    result.rows = _encoded(stored.dequantize(), carried, item, scheme, fmt, result)
    return result


def _axis(item: Item, name: str) -> int:
    return next(output.axis for output in item.outputs if output.name == name)


def _block(
    block: torch.Tensor, item: Item, scheme: Scheme, quantizer: Quantizer, fmt: Format, sums: TaskResult
) -> dict[str, torch.Tensor]:
    """Stored rows of a block, on its device; adds to `sums` what they are off by."""
    return _encoded(block, quantizer(block, scheme), item, scheme, fmt, sums)


def _encoded(
    block: torch.Tensor, quantized: QuantizedTensor, item: Item, scheme: Scheme, fmt: Format, sums: TaskResult
) -> dict[str, torch.Tensor]:
    """Stored rows of a quantized block; adds to `sums` what they are off `block` by."""
    stored = fmt.encode(item.name, quantized)
    weight = StoredWeight(item.name, scheme, (block.shape[0], block.shape[1]))
    _compare(quantized, fmt.decode(stored, weight), item, fmt)
    found = native.squared_sums(block, quantized)
    step = max(1, _BLOCK_WEIGHTS // block.shape[1])
    pieces = ((i, i + step) for i in range(0, len(block), step))
    for squared_error, squared_norm in (
        [found] if found else (_squared_sums(block[i:j], quantized.rows(i, j)) for i, j in pieces)
    ):
        sums.squared_error += squared_error
        sums.squared_norm += squared_norm
    return stored


def _squared_sums(block: torch.Tensor, quantized: QuantizedTensor) -> tuple[float, float]:
    """``||w - w'||**2`` and ``||w||**2``."""
    exact = block.to(torch.float32, copy=True)  # always: rows of a float32 source are the file itself
    return _square_sum(quantized.dequantize().sub_(exact)), _square_sum(exact)


def _square_sum(block: torch.Tensor) -> float:
    """Sum of squares of float32 [rows, columns]; overwrites `block`. Squares in float32, their sum in float64: orders
    of summation differ between devices, and this keeps what they change far below the reported digits.
    """
    return block.mul_(block).sum(dtype=torch.float64).item()


def _compare(before: QuantizedTensor, after: QuantizedTensor, item: Item, fmt: Format) -> None:
    """What a reader will decode must be what was meant."""
    same = _same_bytes(before.codes, after.codes) and torch.equal(before.scale, after.scale)
    for mine, theirs in ((before.zero_point, after.zero_point), (before.minimum, after.minimum)):
        if mine is not None:
            same = same and theirs is not None and torch.equal(mine, theirs)
    if not same:
        raise GlmquantError(
            f"{item.name} did not survive encoding as {fmt.name}; this is a fault of glmquant, please report it."
        )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """torch.equal of int8 tensors, eight bytes at a time where they divide: it compares item by item."""
    if first.shape == second.shape and first.numel() % 8 == 0 and second.is_contiguous():
        first, second = first.view(-1).view(torch.int64), second.view(-1).view(torch.int64)
    return torch.equal(first, second)


@dataclass
class ItemError:
    """Running sums over the tasks of an item."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    def add(self, result: TaskResult) -> None:
        """Count one more task, in order."""
        self.squared_error += result.squared_error
        self.squared_norm += result.squared_norm

    @property
    def relative(self) -> float:
        """``||w - w'|| / ||w||`` (Frobenius), 0 for a tensor of zeros."""
        if self.squared_norm == 0:
            return 0.0
        return float((self.squared_error / self.squared_norm) ** 0.5)
