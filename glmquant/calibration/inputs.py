"""Mean squares of what layers are given in the model as it is: by how much an error of a weight counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import families, formats
from .._open import OpenedSource
from ..checkpoint.source import TensorInfo
from ..families import TensorSpec
from ..models.blocks import BlockwiseModel
from ..models.building import Checkpoint
from ..recipe import Calibration
from .text import calibration_text

Progress = Callable[[int, int, str], None]


def mean_squares(
    opened: OpenedSource, calibration: Calibration, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Mean squares of what linear layers are given in the model as it is, float64 [columns], by the name of the first
    tensor of each of `glmquant.families.Family.units`. Memory holds one block; computed in float32 on the CPU.
    """
    source = Borrowed(opened)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    checkpoint = Checkpoint(source, family, dims, formats.get("safetensors"), {})
    model = BlockwiseModel(checkpoint, torch.float32, "cpu")
    units: dict[int | None, list[TensorSpec]] = {}
    for unit in family.units(dims):
        units.setdefault(unit.tensors[0].layer, []).append(unit.tensors[0])
    states, options = model.embedded(calibration_text(calibration, opened.folder, dims.context).ids)
    found: dict[str, Tensor] = {}
    tokens = sum(state.shape[1] for state in states)
    for layer in range(dims.layers):
        with model.layer(layer) as block, torch.no_grad():
            sums = {}
            for spec in units[layer]:
                name = (
                    checkpoint.parts(spec)[0]
                    .name.removesuffix(".weight")
                    .removeprefix(model.path(block) + ".")
                )
                sums[spec.name] = _SumOfSquares(block.get_submodule(name))
            for index, state in enumerate(states):
                states[index] = block(state, **options)
            for spec_name, each in sums.items():
                found[spec_name] = each.finish() / tokens
        model.check(states, f"layer {layer}")
        if progress is not None:
            progress(layer + 1, dims.layers, f"calibrating layer {layer}")
    return found


class _SumOfSquares:
    """Adds up the squares of what a module is given."""

    def __init__(self, module: nn.Module) -> None:
        self._sum = torch.zeros((), dtype=torch.float64)
        self._handle = module.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._sum = self._sum + arguments[0].flatten(0, -2).double().square().sum(0)

    def finish(self) -> Tensor:
        self._handle.remove()
        return self._sum


class Borrowed:
    """A source whose shards on a hub are released by somebody else; see `TensorSource`."""

    def __init__(self, opened: OpenedSource) -> None:
        self._source, self._remote = opened.source, opened.remote is not None
        self.folder, self.config, self.files = opened.folder, opened.source.config, opened.source.files

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._source.infos()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._source.read(name, start, stop)

    def prefetch(self, shard: str) -> None:
        self._source.prefetch(shard)

    def release(self, shard: str) -> None:
        if not self._remote:
            self._source.release(shard)
