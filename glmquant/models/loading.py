"""A checkpoint folder to a model that runs: built without weights, then filled tensor by tensor.

Quantized weights stay packed, so a model takes as much memory as its file, and loading it a few row blocks more. No
code of the folder is run, nothing is written into it, and the files may be moved or replaced afterwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import families
from .._open import PathLike
from .._workers import return_freed_memory
from ..checkpoint.source import TensorSource, torch_dtype
from ..errors import SourceError, UsageError
from ..families import Part, Role, TensorSpec
from ..formats import StoredWeight, blocks, read_rows
from ..scheme import QuantizedTensor
from .building import Checkpoint, build, open_checkpoint
from .placement import DeviceMap, Placement, checked_device
from .quantized import packed_names

_BLOCK_BYTES = 16 << 20  # of a 16-bit tensor that are copied at a time
_BLOCK_WEIGHTS = 1 << 19  # of a quantized one: its codes and their temporaries stay in the caches


def load(
    path: PathLike,
    device: torch.device | str | int = "auto",
    dtype: torch.dtype | str | None = None,
    *,
    adapter: PathLike | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: PathLike | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Load a ChatGLM or GLM model from a folder that THUDM published or `convert` wrote.

    Args:
        path: the folder.
        device: where the model goes; ``auto`` is the first GPU if there is one, else the CPU.
        dtype: what it computes in, and of weights that are not quantized: ``torch.bfloat16``, ``"float16"``, ...
            None is what config.json states, on every device. On a CPU, long prompts are slow in half;
            ``bfloat16`` is fastest there and ``float32`` most exact.
        adapter: folder of a LoRA that PEFT wrote; it is merged while loading. For 16-bit checkpoints.
        device_map: spreads the model over devices, as in transformers: ``auto``, ``balanced``, ``balanced_low_0``,
            ``sequential``, one device, or a dictionary of module names; ``cpu`` and ``disk`` offload. Needs accelerate.
        max_memory: limits for `device_map`, by device.
        offload_folder: where ``disk`` in `device_map` puts weights.
        attn_implementation: as in transformers; None is its choice.

    Returns:
        A transformers model in eval mode, with THUDM's ``chat`` and ``stream_chat`` and with ``quantize``. Quantized
        layers are `QuantizedLinear`, and stay as small in memory as they are in the file.

    Raises:
        SourceError: the folder is no whole model of a known family.
        QuantizedSourceError: config.json names a quantization that glmquant does not know.
        UsageError: options that contradict each other.
    """
    if device_map is None:
        device = checked_device(device)  # before anything that takes time
    checkpoint = open_checkpoint(path, adapter)
    model = build(checkpoint, compute_dtype(dtype, checkpoint), attn_implementation)
    folder = checkpoint.source.folder
    model.config._name_or_path = model.name_or_path = os.fspath(path)
    placement = Placement(model, device, device_map, max_memory, offload_folder, folder)
    layer = None
    with torch.no_grad():
        for spec in checkpoint.present():
            if spec.layer != layer:
                let_go(checkpoint)
                layer = spec.layer
            if spec.role is Role.HEAD and checkpoint.dims.tied_head:
                check_tied(checkpoint, spec)
            else:
                fill(model, checkpoint, spec, placement)
    let_go(checkpoint)
    placement.finish()
    if not placement.spread and checkpoint.family.name != "chatglm":  # whose layers are stored in one
        from .fused import fuse

        fuse(model)
    return model.eval()


def let_go(checkpoint: Checkpoint) -> None:
    """Unmap the files (they are opened again where more is read) and return freed blocks: both are resident memory."""
    for shard in {info.shard for info in checkpoint.source.infos().values()}:
        checkpoint.source.release(shard)
    return_freed_memory()


def compute_dtype(dtype: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    """What a model computes in; see `load`."""
    if dtype is None or dtype == "auto":
        return torch_dtype(families.stated_dtype(checkpoint.source.config))
    return checked_dtype(dtype)


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that is meant; `UsageError` where a model cannot compute in it."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2):
        raise UsageError(f"dtype {dtype!r} is not one to compute in; use float16, bfloat16 or float32.")
    return found


def fill(model: Any, checkpoint: Checkpoint, spec: TensorSpec, placement: Placement) -> list[str]:
    """Copy one tensor of the checkpoint to the parameters that it becomes; returns their names."""
    parts = checkpoint.parts(spec)
    if spec.name in checkpoint.quantized:
        layers = {part: model.get_submodule(part.name.removesuffix(".weight")) for part in parts}
        names = {part: packed_names(part.name, layer) for part, layer in layers.items()}
        for part in parts:
            for name in names[part]:
                placement.materialize(name)
        for start, rows in _decoded_blocks(checkpoint, checkpoint.quantized[spec.name]):
            for part, low, high in _overlaps(parts, start, rows.codes.shape[0]):
                layers[part].write_rows(start + low - part.start, rows.rows(low, high))
    else:
        names = {part: [part.name] for part in parts}
        targets = {part: placement.materialize(part.name) for part in parts}
        for start, block in _blocks(checkpoint.source, spec):
            for part, low, high in _overlaps(parts, start, block.shape[0]):
                first = start + low - part.start
                targets[part][first : first + high - low].copy_(block[low:high])
    filled = [name for part in parts for name in names[part]]
    for name in filled:
        placement.filled(name)
    return filled


def _overlaps(parts: tuple[Part, ...], start: int, count: int) -> Iterator[tuple[Part, int, int]]:
    """The parts that rows ``start..start + count`` belong to, and which of those rows (counted from `start`)."""
    for part in parts:
        low, high = max(part.start - start, 0), min(part.stop - start, count)
        if low < high:
            yield part, low, high


def _blocks(source: TensorSource, spec: TensorSpec) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _BLOCK_BYTES // (4 * math.prod(spec.shape[1:])))
    for start in range(0, spec.shape[0], step):
        yield start, source.read(spec.name, start, min(spec.shape[0], start + step))


def _decoded_blocks(checkpoint: Checkpoint, weight: StoredWeight) -> Iterator[tuple[int, QuantizedTensor]]:
    for start, stop in blocks(checkpoint.stored_as, weight, _BLOCK_WEIGHTS):
        yield start, read_rows(checkpoint.source, checkpoint.stored_as, weight, start, stop)


def check_tied(checkpoint: Checkpoint, head: TensorSpec) -> None:
    """A head that is stored although config.json ties it to the embedding must be the embedding."""
    source = checkpoint.source
    embedding = next(s for s in checkpoint.family.tensors(checkpoint.dims) if s.role is Role.EMBEDDING)
    suffixes = [""]
    if head.name in checkpoint.quantized:
        weight = checkpoint.quantized[head.name]
        outputs = checkpoint.stored_as.outputs(head.name, weight.shape, weight.scheme)
        suffixes = [output.name.removeprefix(head.name) for output in outputs]
    step = max(1, _BLOCK_BYTES // (4 * head.shape[1]))
    for suffix in suffixes:
        for start in range(0, head.shape[0], step):
            first = source.read(embedding.name + suffix, start, start + step)
            if not torch.equal(first, source.read(head.name + suffix, start, start + step)):
                raise SourceError(
                    f"{source.folder} stores a head ({head.name}) that differs from the embedding, but its "
                    "config.json ties them; if the head was trained, set tie_word_embeddings to false there."
                )
