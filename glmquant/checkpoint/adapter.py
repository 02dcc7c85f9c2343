"""A LoRA fine-tune merged while it is read: ``W + scaling * B @ A``, a few rows at a time.

Reads the folder that PEFT writes (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``). The
adapter may have been trained on THUDM's fused tensors or on the split ones of the native layout, and the base may
be stored either way: rows are matched through the family's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..families import FAMILIES, Dims, Family
from .files import check_inside, read_json
from .source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPERS = ("base_model.model.", "base_model.")


@dataclass(frozen=True)
class _Update:
    """Rows ``start..start + len(b)`` of a weight gain ``b @ a``; `b` is scaled already."""

    start: int
    a: torch.Tensor  # float32 [rank, columns]
    b: torch.Tensor  # float32 [rows, rank]


class AdapterSource:
    """`base` with the adapter in `folder` merged into it.

    The sum is computed in float32 and rounded to the dtype of the base, so the result is, byte for byte, what
    converting an already merged checkpoint gives.

    Raises:
        SourceError: the folder holds no LoRA, a variant of it that is not a plain sum, or one made for another model.
    """

    def __init__(self, base: TensorSource, folder: Path, family: Family, dims: Dims) -> None:
        self._base = base
        self._adapter_file, tensors, config = _read_adapter(folder)
        self._updates: dict[str, list[_Update]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._match(tensors, config, _rows_by_name(base, family, dims))

    def _match(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        rows: Mapping[str, list[tuple[str, int, int, int]]],
    ) -> None:
        infos = self._base.infos()
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name = key
            for wrapper in _WRAPPERS:
                name = name.removeprefix(wrapper)
            module, _, part = name.partition(".lora_")
            if part in ("A.weight", "B.weight", "A.default.weight", "B.default.weight"):
                pairs.setdefault(module, {})[part[0]] = tensor
            elif name in infos:  # PEFT's modules_to_save: trained whole
                if tuple(tensor.shape) != infos[name].shape:
                    raise SourceError(
                        f"the adapter replaces {name} by a tensor of shape {list(tensor.shape)}, "
                        f"the model has {list(infos[name].shape)}."
                    )
                self._replaced[name] = tensor
            else:
                raise SourceError(f"the adapter holds {key}, which is not part of a plain LoRA.")
        for module, pair in sorted(pairs.items()):
            if set(pair) != {"A", "B"}:
                raise SourceError(f"the adapter holds only one half of the LoRA of {module}.")
            if module + ".weight" not in rows:
                raise SourceError(
                    f"the adapter was made for a module {module}, which this model does not have."
                )
            b = pair["B"].float() * _scaling(config, module)
            a = pair["A"].float()
            for target, first, count, start in rows[module + ".weight"]:
                columns = infos[target].shape[1]
                total = sum(part[2] for part in rows[module + ".weight"])
                if a.shape != (b.shape[1], columns) or b.shape[0] != total:
                    raise SourceError(
                        f"the LoRA of {module} is [{b.shape[0]}, {b.shape[1]}] x {list(a.shape)}, the weight "
                        f"[{total}, {columns}]: the adapter belongs to another model."
                    )
                update = _Update(start, a, b[first : first + count])
                self._updates.setdefault(target, []).append(update)

    @property
    def folder(self) -> Path:
        """See `TensorSource`."""
        return self._base.folder

    @property
    def config(self) -> dict[str, Any]:
        """See `TensorSource`."""
        return self._base.config

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files of the base, then the adapter's."""
        return (*self._base.files, self._adapter_file)

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._base.infos()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource`."""
        import torch

        if name in self._replaced:
            dtype = self._base.read(name, 0, 0).dtype
            return self._replaced[name][start:stop].to(dtype)
        rows = self._base.read(name, start, stop)
        if name not in self._updates:
            return rows
        merged = rows.float()
        stop = start + rows.shape[0]
        for update in self._updates[name]:
            low, high = max(start, update.start), min(stop, update.start + update.b.shape[0])
            if low < high:
                b = update.b[low - update.start : high - update.start]
                merged[low - start : high - start] += torch.matmul(b, update.a)
        return merged.to(rows.dtype)

    def prefetch(self, shard: str) -> None:
        """See `TensorSource`."""
        self._base.prefetch(shard)

    def release(self, shard: str) -> None:
        """See `TensorSource`."""
        self._base.release(shard)


def _rows_by_name(
    base: TensorSource, family: Family, dims: Dims
) -> dict[str, list[tuple[str, int, int, int]]]:
    """For every name a LoRA may be trained under: (stored weight, first row of the LoRA, rows, first row there)."""
    rows: dict[str, list[tuple[str, int, int, int]]] = {}
    for layout in family.layouts:
        for tensor in family.in_layout(dims, layout):
            if len(tensor.shape) == 2 and tensor.source in base.infos():
                rows.setdefault(tensor.name, [(tensor.source, 0, tensor.shape[0], tensor.start)])
    if family.name == "glm":  # a converted model; its adapter may be older than the conversion
        for spec in FAMILIES["chatglm2"].tensors(dims):
            if len(spec.shape) == 2:
                rows[spec.name] = [(p.name, p.start, p.stop - p.start, 0) for p in spec.native]
    return rows


def _read_adapter(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise SourceError(f"--adapter {folder} is not a folder; pass the folder that PEFT wrote.")
    if (folder / "pytorch_model.bin").exists() and not (folder / _CONFIG).exists():
        raise SourceError(
            f"{folder} looks like THUDM's P-tuning checkpoint (a prefix for the attention caches, not a change "
            "of the weights); it cannot be merged. Convert the base model and load the prefix beside it."
        )
    config = read_json(folder / _CONFIG)
    kind = config.get("peft_type")
    if kind in ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"):
        raise SourceError(
            f"{folder} holds a {kind} prefix, which is not a change of the weights and cannot be merged; "
            "convert the base model and load the prefix beside it."
        )
    if kind != "LORA":
        raise SourceError(f"{folder} holds a PEFT adapter of type {kind}; only LORA can be merged.")
    if config.get("use_dora"):
        raise SourceError(f"{folder} holds a DoRA adapter; merge it with PEFT first.")
    if config.get("bias", "none") != "none":
        raise SourceError(
            f"{folder} holds a LoRA that trained biases (bias={config['bias']!r}); merge it with PEFT first."
        )
    for name in _FILES:
        path = folder / name
        if not path.exists():
            continue
        check_inside(folder, name, "the adapter")
        try:
            if name.endswith(".safetensors"):
                return path, load_file(path), config
            return path, torch.load(path, map_location="cpu", weights_only=True), config
        except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
            raise SourceError(f"{path} is damaged ({error}); copy it again.") from None
    raise SourceError(f"{folder} holds neither {_FILES[0]} nor {_FILES[1]}.")


def _scaling(config: Mapping[str, Any], module: str) -> float:
    """``lora_alpha / r`` (``/ sqrt(r)`` for rsLoRA), with PEFT's per-module patterns."""
    import re

    def chosen(patterns: Mapping[str, Any] | None, default: Any) -> float:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(default)

    rank = chosen(config.get("rank_pattern"), config["r"])
    alpha = chosen(config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
