"""A LoRA fine-tune merged while it is read: ``W + scaling * B @ A``, a few rows at a time.

Reads the folder that PEFT writes (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``). The
adapter may have been trained on THUDM's fused tensors or on the split ones of the native layout, and the base may
be stored either way: rows are matched through the family's table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..families import FAMILIES, Dims, Family
from .files import check_inside, first_bytes, read_json
from .source import TensorInfo, TensorSource, load_bin

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPERS = ("base_model.model.", "base_model.")

# Switches of PEFT's LoRA under which the result is something else than W + scaling * B @ A.
_VARIANTS = (
    "use_dora", "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
# Initializations that change the base weights before training starts, so that B @ A is relative to those.
_MOVED_BASES = ("corda", "loftq", "lora_ga", "olora", "pissa")

# Weights in one product: its float64 result stays in a core's cache.
_PRODUCT_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class _Rows:
    """Rows ``first..first + count`` of a tensor that an adapter knows are rows ``start..`` of the stored `target`."""

    target: str
    first: int
    count: int
    start: int


@dataclass(frozen=True, eq=False)  # told apart by identity, as a key of the cache
class _Lora:
    """The two halves of a LoRA as its file holds them (mapped, not in memory), and its scaling."""

    a: torch.Tensor  # [rank, columns]
    b: torch.Tensor  # [rows, rank]
    factor: float


@dataclass(frozen=True)
class _Factors:
    """A LoRA ready to be multiplied: ``(b @ a) * b_unit * a_unit``.

    `a` and `b` hold integers so small that every sum of products is exact in float64. BLAS adds in an order that
    depends on the machine, the threads and the number of rows; so the result does not.
    """

    a: torch.Tensor  # float64 [rank, columns]
    a_unit: torch.Tensor  # [1, columns], powers of two
    b: torch.Tensor  # float64 [rows, rank]
    b_unit: torch.Tensor  # [rows, 1], powers of two

    @classmethod
    def of(cls, lora: _Lora) -> _Factors:
        bits = (53 - lora.b.shape[1].bit_length()) // 2
        a, a_unit = _to_integers(lora.a.float(), 0, bits)
        b, b_unit = _to_integers(lora.b.float() * lora.factor, 1, bits)
        return cls(a, a_unit, b, b_unit)

    def add_to(self, rows: torch.Tensor, first: int) -> None:
        """Add rows ``first..`` of the product to float32 `rows`."""
        step = max(1, _PRODUCT_WEIGHTS // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            block = rows[start : start + step]
            own = slice(first + start, first + start + block.shape[0])
            block += (self.b[own] @ self.a).mul_(self.b_unit[own]).mul_(self.a_unit).float()


def with_adapter(
    folder: Path, adapter: str | os.PathLike[str] | None
) -> tuple[Path, str | os.PathLike[str] | None]:
    """The folder of the base, and the LoRA to merge: without being asked, one that lies there, as in transformers.

    Raises:
        SourceError: `folder` holds an adapter alone, and its base is not on this machine.
    """
    if adapter is not None or not (folder / ADAPTER_CONFIG).exists():
        return folder, adapter
    if (folder / "config.json").exists():
        return folder, folder
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not (isinstance(base, str) and base and Path(base).is_dir()):
        raise SourceError(
            f"{folder} holds an adapter, and its base model ({base!r:.200}) is no folder on this machine; use "
            f"the base with this folder as its adapter: glmquant.load(BASE, adapter={str(folder)!r}), or --adapter."
        )
    return Path(base), folder


class AdapterSource:
    """`base` with the adapter in `folder` merged into it.

    Added in float32 and rounded to the dtype of the base, to the same bytes however the rows are read: converting
    with an adapter gives what converting the merged checkpoint gives.

    Raises:
        SourceError: the folder holds no LoRA, a variant of it that is not a plain sum, or one made for another model.
    """

    def __init__(self, base: TensorSource, folder: Path, family: Family, dims: Dims) -> None:
        self._base = base
        self._adapter_file, tensors, config = _read_adapter(folder)
        self._updates: dict[str, list[tuple[_Rows, _Lora]]] = {}
        # Every row block of a weight needs its factors again, and no other weight does for long.
        self._factors = lru_cache(maxsize=4)(_Factors.of)
        self._replaced: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._match(tensors, config, _rows_by_name(base, family, dims))

    def _match(
        self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], rows: Mapping[str, list[_Rows]]
    ) -> None:
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name = key
            for wrapper in _WRAPPERS:
                name = name.removeprefix(wrapper)
            module, _, part = name.partition(".lora_")
            if part in ("A.weight", "B.weight", "A.default.weight", "B.default.weight"):
                pairs.setdefault(module, {})[part[0]] = tensor
            elif name in rows:  # PEFT's modules_to_save: trained whole
                self._replace(name, tensor, rows[name])
            else:
                raise SourceError(
                    f"{self._adapter_file} holds {key}, which is neither half of a LoRA nor a tensor of this model."
                )
        for module, pair in sorted(pairs.items()):
            if set(pair) != {"A", "B"}:
                raise SourceError(
                    f"{self._adapter_file} holds only the {next(iter(pair))} half of the LoRA of {module}."
                )
            if len(self._shape(rows.get(module + ".weight", []))) != 2:
                raise SourceError(
                    f"{self._adapter_file} was made for a module {module}, which this model does not have."
                )
            self._update(module, pair, _scaling(config, module), rows[module + ".weight"])

    def _shape(self, rows: list[_Rows]) -> tuple[int, ...]:
        """Shape of the tensor that an adapter knows; empty for none."""
        if not rows:
            return ()
        return (sum(part.count for part in rows), *self._base.infos()[rows[0].target].shape[1:])

    def _replace(self, name: str, tensor: torch.Tensor, rows: list[_Rows]) -> None:
        if tuple(tensor.shape) != self._shape(rows):
            raise SourceError(
                f"{self._adapter_file} replaces {name} by a tensor of shape {list(tensor.shape)}, the model has "
                f"{list(self._shape(rows))}: the adapter belongs to another model."
            )
        for part in rows:
            piece = tensor[part.first : part.first + part.count]
            self._replaced.setdefault(part.target, []).append((part.start, piece))

    def _update(
        self, module: str, pair: Mapping[str, torch.Tensor], scaling: tuple[int, float], rows: list[_Rows]
    ) -> None:
        rank, factor = scaling
        a, b = pair["A"].float(), pair["B"].float() * factor
        height, width = self._shape(rows)
        if tuple(a.shape) != (rank, width) or tuple(b.shape) != (height, rank):
            raise SourceError(
                f"the LoRA of {module} in {self._adapter_file} is {list(b.shape)} x {list(a.shape)}; for a weight "
                f"of [{height}, {width}] and the rank {rank} of {ADAPTER_CONFIG} it must be [{height}, {rank}] x "
                f"[{rank}, {width}]. The adapter belongs to another model, or to another {ADAPTER_CONFIG}."
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise SourceError(f"the LoRA of {module} in {self._adapter_file} holds NaN or an infinite value.")
        lora = _Lora(pair["A"], pair["B"], factor)
        for part in rows:
            self._updates.setdefault(part.target, []).append((part, lora))

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
        """Weight files of the base, then the adapter's: its configuration decides the result too."""
        return (*self._base.files, self._adapter_file, self._adapter_file.with_name(ADAPTER_CONFIG))

    def infos(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._base.infos()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See `TensorSource`."""
        rows = self._base.read(name, start, stop)
        if name not in self._replaced and name not in self._updates:
            return rows
        stop = start + rows.shape[0]
        merged = rows.float() if rows.element_size() < 4 else rows.clone()  # never the file's own memory
        for first, tensor in self._replaced.get(name, ()):
            low, high = max(start, first), min(stop, first + tensor.shape[0])
            if low < high:
                merged[low - start : high - start] = tensor[low - first : high - first]
        for part, lora in self._updates.get(name, ()):
            low, high = max(start, part.start), min(stop, part.start + part.count)
            if low < high:
                first = part.first + low - part.start
                self._factors(lora).add_to(merged[low - start : high - start], first)
        return merged.to(rows.dtype)

    def prefetch(self, shard: str) -> None:
        """See `TensorSource`."""
        self._base.prefetch(shard)

    def release(self, shard: str) -> None:
        """See `TensorSource`."""
        self._base.release(shard)


def _rows_by_name(base: TensorSource, family: Family, dims: Dims) -> dict[str, list[_Rows]]:
    """Where the rows of a tensor are stored, for every name that an adapter may know it by."""
    stored = base.infos()
    rows: dict[str, list[_Rows]] = {}
    for layout in family.layouts:
        for tensor in family.in_layout(dims, layout):
            if tensor.source in stored:
                rows[tensor.name] = [_Rows(tensor.source, 0, tensor.shape[0], tensor.start)]
    if family.name == "glm":  # a converted model; its adapter may be older than the conversion
        for spec in FAMILIES["chatglm2"].tensors(dims):
            if spec.native and all(part.name in stored for part in spec.native):
                rows[spec.name] = [_Rows(p.name, p.start, p.stop - p.start, 0) for p in spec.native]
    return rows


def _to_integers(values: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` as integers of at most `bits` bits, and their unit, a power of two chosen along `dim`."""
    import torch

    _, exponent = torch.frexp(values.abs().amax(dim, keepdim=True))
    # The bits of float64: a power of two is its exponent, plus 1023, above 52 zeros. No library's pow is asked.
    unit = ((exponent.long() - bits + 1023) << 52).view(torch.float64)
    return (values.double() / unit).round_(), unit


def _read_adapter(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise SourceError(f"--adapter {folder} is not a folder; pass the folder that PEFT wrote.")
    if not (folder / ADAPTER_CONFIG).exists():
        _refuse_p_tuning(folder)
        raise SourceError(f"{folder} holds no {ADAPTER_CONFIG}; pass the folder that PEFT wrote.")
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_variants(folder, config)
    for name in _FILES:
        path = folder / name
        if not path.exists():
            continue
        check_inside(folder, name, "the adapter")
        if name.endswith(".bin"):
            return path, load_bin(path), config
        first_bytes(path)
        try:
            return path, load_file(path), config
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{path} is damaged ({error}); copy it again.") from None
    raise SourceError(f"{folder} holds neither {_FILES[0]} nor {_FILES[1]}.")


def _refuse_p_tuning(folder: Path) -> None:
    """THUDM's P-tuning writes a model folder in which there is nothing but a prefix."""
    base = folder / "config.json"
    if read_json(base).get("pre_seq_len") if base.exists() else (folder / "pytorch_model.bin").exists():
        raise SourceError(
            f"{folder} looks like THUDM's P-tuning checkpoint (a prefix for the attention caches, not a change "
            "of the weights); it cannot be merged. Convert the base model and load the prefix beside it."
        )


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind in ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"):
        raise SourceError(
            f"{folder} holds a {kind} prefix, which is not a change of the weights and cannot be merged; "
            "convert the base model and load the prefix beside it."
        )
    if kind != "LORA":
        raise SourceError(f"{folder} holds a PEFT adapter of type {kind}; only LORA can be merged.")
    for switch in _VARIANTS:
        if config.get(switch):
            raise SourceError(
                f"{folder} holds a variant of LoRA ({switch}) that is not a plain sum; merge it with PEFT first."
            )
    if config.get("bias", "none") != "none":
        raise SourceError(
            f"{folder} holds a LoRA that trained biases (bias={config['bias']!r}); merge it with PEFT first."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVED_BASES):
        raise SourceError(
            f"{folder} holds a LoRA for base weights that were changed when it was set up (init_lora_weights="
            f"{start!r}); merge it with PEFT first, or let PEFT convert it to a plain LoRA."
        )


def _scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank, and ``lora_alpha / r`` (``/ sqrt(r)`` for rsLoRA), with PEFT's per-module patterns."""

    def chosen(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    try:
        rank = int(chosen(config.get("rank_pattern"), config["r"]))
        alpha = float(chosen(config.get("alpha_pattern"), config["lora_alpha"]))
        return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise SourceError(
            f"{ADAPTER_CONFIG} of the adapter has a bad r, lora_alpha or pattern ({error!r})."
        ) from None
