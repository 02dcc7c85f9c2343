"""Where the parameters of a model that is being loaded go: one device, or several by a device map of accelerate's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._pages import in_huge_pages
from ..errors import UsageError

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


class Placement:
    """Gives parameters of `model`, which are on the meta device, memory on the devices where they belong.

    Args:
        model: everything but rotary frequencies is on the meta device.
        device: where all of it goes, unless there is a `device_map`.
        device_map: see `glmquant.load`.
        max_memory: see `glmquant.load`.
        offload_folder: see `glmquant.load`.
        checkpoint: the folder that is loaded, into which nothing may be written.

    Raises:
        UsageError: there is no such device, or options contradict each other.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device | str | int,
        device_map: DeviceMap | None,
        max_memory: Mapping[int | str, int | str] | None,
        offload_folder: str | os.PathLike[str] | None,
        checkpoint: Path,
    ) -> None:
        self._model = model
        # A parameter may be known by several names (tied weights).
        self._names: dict[str, list[str]] = {}
        by_identity: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            same = by_identity.setdefault(id(parameter), [])
            same.append(name)
            self._names[name] = same
        if device_map is None:
            self._map: dict[str, Any] = {"": checked_device(device)}
        elif device != "auto":
            raise UsageError("device and device_map contradict each other; pass one of them.")
        else:
            self._map = _resolve(model, device_map, max_memory)
        if self.spread:
            _require_accelerate()
        self._folder = None if offload_folder is None else Path(offload_folder).expanduser()
        self._index: dict[str, Any] = {}
        if "disk" in self._map.values():
            self._prepare_folder(checkpoint)

    @property
    def spread(self) -> bool:
        """Whether there is more than one place."""
        return len(set(self._map.values())) > 1 or "disk" in self._map.values()

    def _prepare_folder(self, checkpoint: Path) -> None:
        if self._folder is None:
            raise UsageError("device_map sends layers to disk; pass offload_folder, a folder for them.")
        if self._folder.resolve().is_relative_to(checkpoint.resolve()):
            raise UsageError(
                "offload_folder is inside the checkpoint, into which nothing is written; pass another."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "index.json").unlink(missing_ok=True)  # of a model that was here before

    def _device(self, name: str) -> Any:
        """The entry of the device map with the longest matching name."""
        while name not in self._map:
            if not name:
                raise UsageError("device_map does not say where every layer goes.")
            name = name.rpartition(".")[0]
        return self._map[name]

    @property
    def device(self) -> torch.device:
        """Where a model goes that is not spread."""
        device: torch.device = self._map[""]
        return device

    def materialize(self, name: str) -> Tensor:
        """Give the parameter called `name` memory; returns it, to be filled."""
        old = self._model.get_parameter(name)
        device = self._device(name)
        empty = torch.empty_like(old, device="cpu" if device == "disk" else device)
        if empty.device.type == "cpu":
            in_huge_pages(empty)
        return self._replace(name, empty)

    def _replace(self, name: str, tensor: Tensor) -> Tensor:
        new = nn.Parameter(tensor, requires_grad=self._model.get_parameter(name).requires_grad)
        for alias in self._names[name]:
            path, _, own = alias.rpartition(".")
            setattr(self._model.get_submodule(path), own, new)
        return new.data

    def filled(self, name: str) -> None:
        """Say that the parameter has its values: those that belong on the disk go there."""
        if self._device(name) != "disk":
            return
        from accelerate.utils import offload_weight

        tensor = self._model.get_parameter(name).detach()
        for alias in self._names[name]:
            offload_weight(tensor, alias, str(self._folder), self._index)
        self.release(name)

    def release(self, name: str) -> None:
        """Take the memory of the parameter away again."""
        self._replace(name, self._model.get_parameter(name).detach().to("meta"))

    def finish(self) -> None:
        """Move what is no parameter, and let accelerate bring layers and activations together."""
        if not self.spread:
            self._model.to(next(iter(self._map.values())))
            return
        from accelerate import dispatch_model
        from accelerate.utils import save_offload_index

        save_offload_index(self._index, str(self._folder))
        dispatch_model(
            self._model,
            self._map,
            offload_dir=None if self._folder is None else str(self._folder),
            skip_keys=self._model._skip_keys_device_placement,
        )


def _require_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            "a device_map needs accelerate: pip install 'glmquant[offload]'; or pass one device instead."
        )


def checked_device(device: Any) -> torch.device:
    """The device that is meant: ``auto`` is the first GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(
            f"device {str(device)!r} cannot be used here ({reason}); use 'cpu', or a build of PyTorch for the GPU."
        ) from None
    return found


def _resolve(
    model: Any, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, Any]:
    """A device map as a dictionary of module names."""
    if isinstance(device_map, Mapping):
        return {name: d if d == "disk" else checked_device(d) for name, d in device_map.items()}
    if device_map not in _STRATEGIES:
        return {"": checked_device(device_map)}
    _require_accelerate()
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    limits = None if max_memory is None else dict(max_memory)
    whole = model._no_split_modules
    if device_map != "sequential":
        low = device_map == "balanced_low_0"
        limits = get_balanced_memory(model, limits, no_split_module_classes=whole, low_zero=low)
    found = infer_auto_device_map(model, limits, no_split_module_classes=whole)
    return {name: d if d == "disk" else checked_device(d) for name, d in found.items()}
