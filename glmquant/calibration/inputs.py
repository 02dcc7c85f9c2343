"""What text tells about layers in the model as it is: by how much an error counts, of a weight and of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


_WINDOWS = 8  # on which importances are found


@dataclass(frozen=True)
class LayerFacts:
    """What text tells about a linear layer, or about q, k and v together.

    Attributes:
        squares: mean squares of its inputs, float64 [columns].
        importance: what an error of its output costs the model: the KL divergence of the next token, in nats, for each
            unit of relative squared error.
    """

    squares: Tensor
    importance: float = 1.0


def layer_facts(
    opened: OpenedSource, calibration: Calibration, progress: Progress | None = None, importance: bool = True
) -> dict[str, LayerFacts]:
    """Facts about the layers of the model as it is, by the name of the first tensor of each of `Family.units`.

    A small change d of a layer's output changes the predicted distributions by ``E[(g d)^2] / 2`` in KL divergence, g
    being the gradient of the log-likelihood of a token that is drawn from the model's own prediction (their second
    moments are the Fisher information). For errors that are independent from one output channel to the next, and each
    in proportion to the size of its channel y, that is the relative squared error times ``sum E[g^2] E[y^2] / 2``.

    Memory holds one block, what all windows have become, and for importances a few of them at every depth. Computed in
    float32 on the CPU.

    Args:
        opened: the model.
        calibration: the text.
        progress: called with layers done, layers in all, and what is done.
        importance: whether to find importances, which takes gradients.
    """
    source = Borrowed(opened)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    checkpoint = Checkpoint(source, family, dims, formats.get("safetensors"), {})
    model = BlockwiseModel(checkpoint, torch.float32, "cpu")
    units: dict[int | None, list[tuple[TensorSpec, ...]]] = {}
    for unit in family.units(dims):
        units.setdefault(unit.tensors[0].layer, []).append(unit.tensors)
    states, options = model.embedded(calibration_text(calibration, opened.folder, dims.context).ids)
    few = [number * len(states) // _WINDOWS for number in range(_WINDOWS)] if importance else []
    few = sorted(set(few))
    depths: list[list[Tensor]] = []
    squares: dict[str, Tensor] = {}
    tokens = sum(state.shape[1] for state in states)
    steps = dims.layers * (2 if importance else 1)
    for layer in range(dims.layers):
        depths.append([states[index] for index in few])
        with model.layer(layer) as block, torch.no_grad():
            path = model.path(block) + "."
            sums = {
                specs[0].name: _SumOfSquares(block.get_submodule(_modules(checkpoint, specs[:1], path)[0]))
                for specs in units[layer]
            }
            for index, state in enumerate(states):
                states[index] = block(state, **options)
            for name, each in sums.items():
                squares[name] = each.finish() / tokens
        model.check(states, f"layer {layer}")
        if progress is not None:
            progress(layer + 1, steps, f"calibrating layer {layer}")
    if not importance:
        return {name: LayerFacts(found) for name, found in squares.items()}
    gradients = _gradients(model, [states[index] for index in few])
    facts = {}
    for layer in reversed(range(dims.layers)):
        with model.layer(layer) as block:
            path = model.path(block) + "."
            modules = {specs[0].name: _modules(checkpoint, specs, path) for specs in units[layer]}
            inside = [name for names in modules.values() for name in names]
            found = _backward(block, inside, depths.pop(), gradients, options)
            for name, names in modules.items():
                facts[name] = LayerFacts(squares[name], sum(found[module] for module in names))
        if progress is not None:
            progress(2 * dims.layers - layer, steps, f"weighing layer {layer}")
    return facts


def _modules(checkpoint: Checkpoint, specs: Iterable[TensorSpec], path: str) -> list[str]:
    """The names in a block of the modules that linear weights belong to."""
    return [
        part.name.removesuffix(".weight").removeprefix(path)
        for spec in specs
        for part in checkpoint.parts(spec)
    ]


def _gradients(model: BlockwiseModel, states: list[Tensor]) -> list[Tensor]:
    """Gradients of log-likelihoods by what the last layer gives; the tokens are drawn from the predictions."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    with model.last_norm() as norm, model.head() as head, torch.enable_grad():
        for state in states:
            leaf = state.detach().requires_grad_()
            logs = head(norm(leaf)[0]).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            gradients.append(torch.autograd.grad(logs.gather(-1, drawn).sum(), leaf)[0])
    return gradients


def _backward(
    block: nn.Module, names: list[str], states: list[Tensor], gradients: list[Tensor], options: dict[str, Any]
) -> dict[str, float]:
    """The importance of modules; replaces the gradients by those of the block's inputs."""
    given: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: given.update({name: output})
        )
        for name in names
    ]
    sums = {name: [torch.zeros((), dtype=torch.float64)] * 2 for name in names}
    for index, state in enumerate(states):
        with torch.enable_grad():
            leaf = state.detach().requires_grad_()
            output = block(leaf, **options)
        found = torch.autograd.grad(output, [leaf, *(given[name] for name in names)], gradients[index])
        gradients[index] = found[0]
        for name, gradient in zip(names, found[1:], strict=True):
            channel, bias = given[name].detach(), getattr(block.get_submodule(name), "bias", None)
            pair = (gradient, channel if bias is None else channel - bias.detach())
            sums[name] = [s + x.double().square().sum((0, 1)) for s, x in zip(sums[name], pair, strict=True)]
    for handle in handles:
        handle.remove()
    tokens = sum(state.shape[1] for state in states)
    return {name: float((g * y).sum()) / tokens**2 / 2 for name, (g, y) in sums.items()}


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
