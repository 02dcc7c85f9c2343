"""Checking what is on disk: structure, hashes, and whether every weight decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import families, formats, hub
from ._folding import Folds, effective, from_letters
from ._hashing import sha256
from ._open import PathLike, open_source
from .checkpoint.files import check_inside, read_json
from .checkpoint.output import REPORT
from .checkpoint.source import TensorSource, open_folder, torch_dtype
from .errors import SourceError, UnsafeFileError, UsageError, VerificationError
from .families import Dims, Family, LayoutTensor, Role
from .formats import Format, StoredWeight, blocks, read_rows
from .plan import Plan

_BLOCK_WEIGHTS = 1 << 20
_FLOATS = ("F16", "BF16", "F32")


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


def check_written(folder: Path, plan: Plan) -> None:
    """Compare the structure of a finished conversion with the plan, as the safetensors library reads it.

    The hashes of its shards were compared when each was finished (see `ShardedSink`).

    Raises:
        VerificationError: a tensor is not what was planned.
    """
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
        SourceError: there is no checkpoint in the folder, or `source` cannot be what it was made from. What is
            wrong inside the folder is in `Verification.problems`.
        UsageError: an adapter was merged and `adapter` does not name it.
    """
    folder = hub.local_folder(out)
    result = Verification(folder)
    report = _check_hashes(folder, result)
    try:
        config = read_json(folder / "config.json")
        family = families.detect(config)
    except SourceError:
        if result.problems:  # a folder of ours, and its damage is known
            return result
        raise
    dims = family.dims(config)
    try:
        checkpoint = open_folder(folder)
        result.tensors = len(checkpoint.infos())
        fmt = formats.detect(config)
        weights = {w.name: w for w in fmt.quantized(config, family, dims)}
    except SourceError as error:
        result.problems = result.problems or [str(error)]
        return result
    layout = list(family.in_layout(dims, family.layout_of(config)))
    faults = _structure(checkpoint, fmt, layout, weights)
    result.problems += faults
    if faults:
        return result  # changed bytes do not end it here: decoding tells which weights they hurt
    originals = None
    if source is not None:
        if adapter is None and report and report["source"]["adapter"]:
            raise UsageError(
                f"a LoRA was merged into {folder}; pass it with --adapter to compare with a source."
            )
        originals = _Originals(open_source(source, adapter).source, family, dims)
        originals.fold(report.get("calibration", {}).get("folded", []), checkpoint)
    for number, tensor in enumerate(layout):
        if tensor.name in weights:
            _check_weight(checkpoint, fmt, weights[tensor.name], originals, result)
            result.quantized += 1
        elif tensor.role is not Role.BUFFER and tensor.name in checkpoint.infos():
            if checkpoint.infos()[tensor.name].decoded:
                _check_decoded(checkpoint, tensor, originals, result)
                result.quantized += 1
            else:
                _check_copy(checkpoint, tensor, originals, result)
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
            dtypes = (dtype,) if dtype.startswith(("I", "U")) else _FLOATS
            if info is None:
                if not tensor.optional:
                    problems.append(f"{name} is missing.")
            elif info.shape != shape:
                problems.append(f"{name} has shape {list(info.shape)}, config.json calls for {list(shape)}.")
            elif info.dtype not in dtypes and tensor.role is not Role.BUFFER:
                problems.append(
                    f"{name} is stored as {info.dtype}, the format calls for {' or '.join(dtypes)}."
                )
    problems += [f"{name} does not belong to the model." for name in sorted(infos)]
    return problems


def _check_hashes(folder: Path, result: Verification) -> dict[str, Any]:
    if not (folder / REPORT).exists():
        return {}
    try:
        report = read_json(folder / REPORT)
        recorded = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in report["files"].items()
        }
        for name in recorded:
            check_inside(folder, name, REPORT)
        bool(report["source"]["adapter"])
        [float(entry.get("relative_error", 0)) for entry in report["tensors"].values()]
        [from_letters(letters) for letters in report.get("calibration", {}).get("folded", [])]
    except UnsafeFileError as error:
        result.problems.append(str(error))
        return {}
    except (SourceError, AttributeError, KeyError, TypeError, ValueError):
        result.problems.append(f"{REPORT} is damaged; nothing could be compared with it.")
        return {}
    for name, (nbytes, digest) in recorded.items():
        path = folder / name
        if not path.is_file():
            result.problems.append(f"{name} is missing.")
        elif path.stat().st_size != nbytes:
            result.problems.append(f"{name} has {path.stat().st_size} bytes, the report says {nbytes}.")
        elif sha256(path) != digest:
            result.problems.append(f"{name} has changed since it was written (SHA-256 differs).")
        result.files += 1
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".gguf", ".py") and path.name not in recorded:
            result.problems.append(f"{path.name} is not one of the files that glmquant wrote.")
    return report


@torch.inference_mode()
def _check_weight(
    checkpoint: TensorSource,
    fmt: Format,
    weight: StoredWeight,
    originals: _Originals | None,
    result: Verification,
) -> None:
    for output in fmt.outputs(weight.name, weight.shape, weight.scheme):
        if (
            output.constant is not None
            and tuple(checkpoint.read(output.name).view(-1).tolist()) != output.constant
        ):
            shown = ", ".join(map(str, output.constant[:4])) + (", ..." if len(output.constant) > 4 else "")
            result.problems.append(f"{output.name} does not hold {shown}.")
            return
    _compare(
        weight.name,
        blocks(fmt, weight, _BLOCK_WEIGHTS),
        lambda start, stop: read_rows(checkpoint, fmt, weight, start, stop).dequantize(),
        originals,
        result,
    )


@torch.inference_mode()
def _compare(
    name: str,
    rows: Iterable[tuple[int, int]],
    read: Callable[[int, int], torch.Tensor],
    originals: _Originals | None,
    result: Verification,
) -> None:
    """Decode `rows` of a quantized weight, and measure their error where there are originals."""
    squared_error = squared_norm = 0.0
    for start, stop in rows:
        try:
            decoded = read(start, stop)
        except SourceError as error:
            result.problems.append(str(error))
            return
        if not bool(torch.isfinite(decoded.sum())):
            result.problems.append(f"{name} decodes to NaN or infinity in rows {start} to {stop - 1}.")
            return
        if originals is not None:
            exact = originals.rows(name, start, stop).to(torch.float32, copy=True)
            squared_error += (decoded - exact).square_().sum().item()
            squared_norm += exact.square_().sum().item()
    if originals is not None:
        result.errors[name] = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _check_decoded(
    checkpoint: TensorSource, tensor: LayoutTensor, originals: _Originals | None, result: Verification
) -> None:
    """A weight that another program has quantized."""
    rows, columns = tensor.shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    starts = ((start, min(rows, start + step)) for start in range(0, rows, step))
    _compare(
        tensor.name, starts, lambda start, stop: checkpoint.read(tensor.name, start, stop), originals, result
    )


@torch.inference_mode()
def _check_copy(
    checkpoint: TensorSource, tensor: LayoutTensor, originals: _Originals | None, result: Verification
) -> None:
    """A tensor that is not quantized holds numbers, and those of the source."""
    rows = tensor.shape[0]
    step = max(1, _BLOCK_WEIGHTS // math.prod(tensor.shape[1:]))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = checkpoint.read(tensor.name, start, stop)
        if not bool(torch.isfinite(block).all()):
            result.problems.append(f"{tensor.name} holds NaN or infinity in rows {start} to {stop - 1}.")
            return
        if originals is not None and not torch.equal(
            block, originals.rows(tensor.name, start, stop).to(block.dtype)
        ):
            result.problems.append(
                f"{tensor.name} is a copy that differs from this source in rows {start} to {stop - 1}; "
                "is it the checkpoint it was made from?"
            )
            return


class _Originals:
    """The weights a folder was made from, by the names that its layout gives them."""

    def __init__(self, source: TensorSource, made: Family, made_dims: Dims) -> None:
        family = families.detect(source.config)
        if family is not made and not (family.name == "chatglm2" and made.name == "glm"):
            raise SourceError(
                f"{source.folder} is a {family.name} checkpoint, the folder a {made.name} one; "
                "pass the checkpoint it was made from."
            )
        dims = family.dims(source.config)
        if replace(dims, context=0) != replace(made_dims, context=0):
            raise SourceError(
                f"{source.folder} is a model of other sizes ({dims.layers} layers, {dims.hidden} wide) than the "
                f"folder ({made_dims.layers} layers, {made_dims.hidden} wide); pass the checkpoint it was made from."
            )
        self._source = source
        self._places = {
            tensor.name: (tensor.source, tensor.start)
            for layout in family.layouts
            for tensor in family.in_layout(dims, layout)
        }
        # A head that a source does not store is its embedding.
        roles = {spec.role: spec for spec in family.tensors(dims)}
        embedding, head = roles[Role.EMBEDDING].name, roles[Role.HEAD].name
        if head not in source.infos():
            tied = {name: (embedding, 0) for name, (stored, _) in self._places.items() if stored == head}
            self._places.update(tied)
        self._family, self._dims, self._folds = family, dims, Folds()

    def fold(self, letters: list[str], made: TensorSource) -> None:
        """Take the originals as scaled: see `glmquant._folding`.

        Args:
            letters: as the report has them.
            made: the folder, which says in what dtype norms are stored.
        """
        known = {name: place[0] for name, place in self._places.items()}
        dtypes = {known.get(name): info.dtype for name, info in made.infos().items()}
        for fold, found in zip(self._family.folds(self._dims), letters, strict=False):
            if len(found) == fold.channels:
                dtype = torch_dtype(dtypes.get(fold.giver.name, "F32"))
                gain = self._source.read(fold.giver.name)
                self._folds.add(fold, effective(fold, from_letters(found), gain, dtype))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._places:
            raise SourceError(f"the source has no weights for {name}; is it what the folder was made from?")
        stored, first = self._places[name]
        if stored not in self._source.infos():
            raise SourceError(f"the source has no {stored}; is it what the folder was made from?")
        rows = self._source.read(stored, first + start, first + stop)
        return self._folds.apply(stored, rows, first + start)


def _compare_errors(result: Verification, report: Mapping[str, Any]) -> None:
    recorded = report.get("tensors", {})
    for name, measured in result.errors.items():
        stated = recorded.get(name, {}).get("relative_error")
        if stated is not None and abs(measured - stated) > 1e-3 * stated + 1e-6:
            result.problems.append(
                f"{name} has a relative error of {measured:.5f} against this source, the report says {stated:.5f}; "
                "is it the checkpoint it was made from?"
            )
