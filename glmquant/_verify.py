"""Checking what is on disk: structure, hashes, and whether every weight decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import families, formats, hub
from ._hashing import sha256
from ._open import PathLike, open_source
from .checkpoint.files import read_json
from .checkpoint.output import REPORT
from .checkpoint.source import TensorSource, open_folder
from .errors import SourceError, VerificationError
from .families import Family, LayoutTensor
from .formats import Format, StoredWeight
from .plan import Plan

_BLOCK_WEIGHTS = 1 << 20


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        folder: what was checked.
        problems: one sentence each; empty when all is well.
        files: number of files whose hash was compared with the report.
        tensors: number of stored tensors.
        quantized: number of quantized weights that were decoded.
        errors: relative error ``||w - w'|| / ||w||`` by weight, when a source was given.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    quantized: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No problems were found."""
        return not self.problems


def check_written(folder: Path, plan: Plan, hashes: Mapping[str, str]) -> None:
    """Read a finished conversion back once and compare structure and hashes with the plan.

    Raises:
        VerificationError: the disk did not keep what was written.
    """
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda shard: sha256(folder / shard.file), plan.shards))
    for shard, digest in zip(plan.shards, found, strict=True):
        if digest != hashes[shard.file]:
            raise VerificationError(
                f"{shard.file} reads back differently from what was written; the disk or the memory of this "
                "machine is faulty. OUT was not created."
            )
    infos = open_folder(folder).infos()
    for shard in plan.shards:
        for tensor in shard.tensors:
            info = infos.get(tensor.name)
            if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
                raise VerificationError(f"{tensor.name} is not in {shard.file} as planned.")


def verify(
    out: PathLike,
    source: PathLike | None = None,
    *,
    adapter: PathLike | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Check a converted folder (or one of THUDM's quantized ones): structure, recorded hashes, decoding.

    Args:
        out: the folder.
        source: the checkpoint it was made from; then the error of every weight is measured and compared with the
            report.
        adapter: the LoRA that was merged into it, if one was.
        progress: called with weights done, weights in all, and a name.

    Raises:
        SourceError: the folder cannot be opened at all. What is wrong inside it is in `Verification.problems`.
    """
    folder = hub.resolve(out).folder
    checkpoint = open_folder(folder)
    family = families.detect(checkpoint.config)
    dims = family.dims(checkpoint.config)
    fmt = formats.detect(checkpoint.config)
    result = Verification(folder, tensors=len(checkpoint.infos()))
    weights = {w.name: w for w in fmt.quantized(checkpoint.config, family, dims)}
    layout = list(family.in_layout(dims, family.layout_of(checkpoint.config)))
    result.problems += _structure(checkpoint, fmt, layout, weights)
    report = _check_hashes(folder, result)
    if result.problems:
        return result
    originals = None
    if source is not None:
        originals = _Originals(open_source(source, adapter).source, family)
    for number, tensor in enumerate(layout):
        if tensor.name in weights:
            _check_weight(checkpoint, fmt, weights[tensor.name], originals, result)
            result.quantized += 1
        if progress is not None:
            progress(number + 1, len(layout), tensor.name)
    _compare_errors(result, report)
    return result


def _structure(
    checkpoint: TensorSource,
    fmt: Format,
    layout: list[LayoutTensor],
    weights: Mapping[str, StoredWeight],
) -> list[str]:
    """Every tensor that config.json calls for is there, with the right shape, and nothing else."""
    infos = dict(checkpoint.infos())
    problems = []
    for tensor in layout:
        if tensor.name in weights:
            weight = weights[tensor.name]
            expected = [
                (t.name, t.shape, t.dtype) for t in fmt.outputs(tensor.name, weight.shape, weight.scheme)
            ]
        else:
            expected = [(tensor.name, tensor.shape, "")]
        for name, shape, dtype in expected:
            info = infos.pop(name, None)
            if info is None:
                if not tensor.optional:
                    problems.append(f"{name} is missing.")
            elif info.shape != shape:
                problems.append(f"{name} has shape {list(info.shape)}, config.json calls for {list(shape)}.")
            elif dtype.startswith("I") and info.dtype != dtype:
                problems.append(f"{name} is stored as {info.dtype}, the format calls for {dtype}.")
    problems += [f"{name} does not belong to the model." for name in sorted(infos)]
    return problems


def _check_hashes(folder: Path, result: Verification) -> dict[str, Any]:
    if not (folder / REPORT).exists():
        return {}
    report = read_json(folder / REPORT)
    for name, entry in report.get("files", {}).items():
        path = folder / name
        if not path.exists():
            result.problems.append(f"{name} is missing.")
        elif path.stat().st_size != entry["bytes"]:
            result.problems.append(
                f"{name} has {path.stat().st_size} bytes, the report says {entry['bytes']}."
            )
        elif sha256(path) != entry["sha256"]:
            result.problems.append(f"{name} has changed since it was written (SHA-256 differs).")
        result.files += 1
    return report


@torch.inference_mode()
def _check_weight(
    checkpoint: TensorSource,
    fmt: Format,
    weight: StoredWeight,
    originals: _Originals | None,
    result: Verification,
) -> None:
    outputs = fmt.outputs(weight.name, weight.shape, weight.scheme)
    rows, columns = weight.shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    step = -(-step // fmt.row_multiple) * fmt.row_multiple
    squared_error = squared_norm = 0.0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        stored = {}
        for output in outputs:
            if output.constant is None:
                # zero points of several rows may share a word
                per_row = -(-rows // output.shape[0])
                stored[output.name] = checkpoint.read(output.name, start // per_row, -(-stop // per_row))
            elif tuple(checkpoint.read(output.name).tolist()) != output.constant:
                result.problems.append(f"{output.name} does not hold {list(output.constant)}.")
                return
        block = StoredWeight(weight.name, weight.scheme, (stop - start, columns))
        decoded = fmt.decode(stored, block).dequantize()
        if not bool(torch.isfinite(decoded.sum())):
            result.problems.append(f"{weight.name} decodes to NaN or infinity in rows {start} to {stop - 1}.")
            return
        if originals is not None:
            exact = originals.rows(weight.name, start, stop).float()
            squared_error += (decoded - exact).square_().sum().item()
            squared_norm += exact.square_().sum().item()
    if originals is not None:
        result.errors[weight.name] = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


class _Originals:
    """The weights a folder was made from, by the names that its layout gives them."""

    def __init__(self, source: TensorSource, made: Family) -> None:
        family = families.detect(source.config)
        if family is not made and not (family.name == "chatglm2" and made.name == "glm"):
            raise SourceError(
                f"{source.folder} is a {family.name} checkpoint, the folder a {made.name} one; "
                "pass the checkpoint it was made from."
            )
        dims = family.dims(source.config)
        self._source = source
        self._places = {
            tensor.name: (tensor.source, tensor.start)
            for layout in family.layouts
            for tensor in family.in_layout(dims, layout)
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._places:
            raise SourceError(f"the source has no weights for {name}; is it what the folder was made from?")
        stored, first = self._places[name]
        return self._source.read(stored, first + start, first + stop)


def _compare_errors(result: Verification, report: Mapping[str, Any]) -> None:
    recorded = report.get("tensors", {})
    for name, measured in result.errors.items():
        stated = recorded.get(name, {}).get("relative_error")
        if stated is not None and abs(measured - stated) > 1e-3 * stated + 1e-6:
            result.problems.append(
                f"{name} has a relative error of {measured:.5f} against this source, the report says {stated:.5f}; "
                "is it the checkpoint it was made from?"
            )
