"""Calibration: quantizing block by block with a view to what text does to the inputs of every layer.

Blocks are taken in order. The inputs of a block are what the *quantized* blocks before it have made of the text, and
inside of a block the output projection sees quantized q, k and v, and so on: what counts is what a layer does to the
inputs that it will get. (To correct every layer towards the original's output, as some do, was tried and left out: it
took twice the time and made things worse, on text of another kind much worse.)

At any time memory holds one block, the text's activations before and behind its attention, and the second moments of
one layer's inputs. After each block what has been found is written to a folder, from which a later run goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families, formats
from .._folding import Folds, effective, to_letters
from .._kept import KeptTensors
from .._open import OpenedSource
from .._pace import Pace
from ..checkpoint.source import torch_dtype
from ..errors import QuantizationError
from ..families import Dims, Family, Fold, TensorSpec
from ..models.blocks import BlockwiseModel
from ..models.building import Checkpoint
from ..models.loading import compute_dtype
from ..packing import pack_int32, unpack_int32
from ..plan import Plan
from ..quantizers import Scaled
from ..scheme import QuantizedTensor
from .inputs import Borrowed
from .text import CalibrationText

if TYPE_CHECKING:
    from .._quantize import Task
    from ..quantizers import Quantizer

Told = Callable[[str], None]


class Calibrator:
    """Quantizes the linear layers of one transformer block after the other; see the module.

    The same bytes come out on the same machine with the same number of threads and the same versions.

    Args:
        opened: what is converted.
        plan: says which scheme every tensor gets.
        text: what the model reads.
        quantizer: is given the second moments of a layer's inputs as statistics.
        device: where to compute: in float32 on a CPU, else in the model's own dtype.
        kept: a folder for what later runs go on from.
        told: is called with the name of what has begun.
    """

    def __init__(
        self,
        opened: OpenedSource,
        plan: Plan,
        text: CalibrationText,
        quantizer: Quantizer,
        device: torch.device,
        kept: Path,
        told: Told = lambda name: None,
    ) -> None:
        source = Borrowed(opened)
        family = families.detect(source.config)
        self._checkpoint = Checkpoint(source, family, plan.dims, formats.get("safetensors"), {})
        dtype = torch.float32 if device.type == "cpu" else compute_dtype(None, self._checkpoint)
        self._model = BlockwiseModel(self._checkpoint, dtype, device)
        self._text, self._quantizer, self._told = text, quantizer, Pace(plan.dims.layers, told)
        self._kept = KeptTensors(kept)
        items = {item.source: item for item in plan.items if not item.carried}
        self._schemes = {name: item.scheme for name, item in items.items() if item.scheme is not None}
        self._folds = Folds()
        self._foldable: dict[int, list[Fold]] = {}
        for fold in family.folds(plan.dims) if isinstance(quantizer, Scaled) else ():
            if fold.giver.name in items and all(taker.name in self._schemes for taker in fold.takers):
                self._foldable.setdefault(fold.layer, []).append(fold)
        self._stored = {name: torch_dtype(item.outputs[0].dtype) for name, item in items.items()}
        self._units: dict[int | None, list[tuple[TensorSpec, ...]]] = {}
        for unit in family.units(plan.dims):
            self._units.setdefault(unit.tensors[0].layer, []).append(unit.tensors)
        self._layer = -1  # the last one that is done
        self._found: dict[str, QuantizedTensor] = {}
        self._scales: dict[str, Tensor] = {}  # of this block, as steps and as they are in effect
        self._states: list[Tensor] = []
        self._options: dict[str, Any] = {}
        self._window = 0  # at which the block is
        self._resumable = self._last_kept(plan.dims.layers)

    def prepared(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, those of linear layers with what they are quantized to, and with scales that are moved between
        them. Takes one block at a time.
        """
        for task in tasks:
            item = task.item
            ready, calibrated = None, item.layer is not None and item.source in self._schemes
            if item.layer is not None and (calibrated or item.layer in self._foldable):
                self._advance(item.layer)
            if calibrated:
                first = item.start + task.start
                ready = self._found[item.source].rows(first, first + task.stop - task.start)
            yield replace(task, ready=ready, folds=self._folds)

    def _advance(self, layer: int) -> None:
        """Be done with the blocks up to `layer`, and hold what it is quantized to."""
        while self._layer < layer:
            following = self._layer + 1
            if self._resumable >= following:
                self._found = self._read(following)
            else:
                self._told.begin(following)
                with self._all_threads(), torch.no_grad():
                    if not self._states:
                        self._restore(following)
                    self._found = self._quantized(following)
                    self._keep(following)
                self._told.end()
            self._layer = following

    @contextmanager
    def _all_threads(self) -> Iterator[None]:
        one = torch.get_num_threads()
        torch.set_num_threads(self._text.threads)
        try:
            yield
        finally:
            torch.set_num_threads(one)

    # one block

    def _quantized(self, layer: int) -> dict[str, QuantizedTensor]:
        found: dict[str, QuantizedTensor] = {}
        with self._model.layer(layer) as block, ExitStack() as kept:
            if layer in self._foldable:
                self._scale(layer, block)
            part = ""
            for specs in self._units[layer]:
                inside = self._inside(block, specs[0])
                if part and not inside.startswith(part + "."):
                    # The attention is done: what it gives is computed once, and not for every layer behind it.
                    kept.enter_context(self._computed_once(block.get_submodule(part)))
                part = inside.partition(".")[0]
                if specs[0].name not in self._schemes:
                    continue  # stays as it is
                self._told(f"calibrating {self._model.path(block)}.{inside}")
                moments = self._moments(block, inside)
                for spec in specs:
                    weight = self._weight(spec).to(moments.device)
                    with _named(spec.name):
                        quantized = self._quantizer(weight, self._schemes[spec.name], moments)
                    self._put(spec, quantized)
                    found[spec.name] = _on_cpu(quantized)
            for index, state in enumerate(self._windows()):
                self._states[index] = block(state, **self._options)
            self._model.check(self._states, f"layer {layer}, quantized,")
        return found

    def _inside(self, block: nn.Module, spec: TensorSpec) -> str:
        """The name in `block` of the module that a linear weight, or its first rows, belongs to."""
        name = self._checkpoint.parts(spec)[0].name.removesuffix(".weight")
        return name.removeprefix(self._model.path(block) + ".")

    def _weight(self, spec: TensorSpec) -> Tensor:
        """A tensor of the source, with scales that have been moved into it or out of it."""
        return self._folds.apply(spec.name, self._checkpoint.source.read(spec.name))

    def _scale(self, layer: int, block: nn.Module) -> None:
        """Choose the scales of a block, for inputs as they are before its weights are quantized, and move them."""
        assert isinstance(self._quantizer, Scaled)
        self._told(f"scaling {self._model.path(block)}")
        read = self._checkpoint.source.read
        inside = {fold: self._inside(block, fold.takers[0]) for fold in self._foldable[layer]}
        moments = self._all_moments(block, inside.values())
        for fold in self._foldable[layer]:
            name = fold.giver.name
            weights = [read(taker.name).to(self._model.device) for taker in fold.takers]
            schemes = [self._schemes[taker.name] for taker in fold.takers]
            with _named(fold.takers[0].name):
                steps = self._quantizer.steps(fold, weights, schemes, moments.pop(inside[fold])).cpu()
            scale = effective(fold, steps, read(name), self._stored[name])
            self._scales |= {f"{name}.steps": steps, f"{name}.moved": scale}
            self._folds.add(fold, scale)
        for spec in self._checkpoint.present():
            if spec.layer == layer and spec.name in self._folds:
                weight = self._weight(spec)
                for part in self._checkpoint.parts(spec):
                    self._model.parameter(part.name).copy_(weight[part.start : part.stop])

    def _windows(self) -> Iterator[Tensor]:
        """What the block is given, window by window."""
        for index, state in enumerate(self._states):
            self._window = index
            yield state

    @contextmanager
    def _computed_once(self, module: nn.Module) -> Iterator[None]:
        """Keep what the attention `module`, whose weights change no more, gives for each window."""
        usual = module.forward
        outputs: dict[int, tuple[Tensor, None]] = {}

        def forward(*arguments: Any, **options: Any) -> Any:
            if self._window not in outputs:  # what comes second, the weights of attention, nobody asks for
                outputs[self._window] = (usual(*arguments, **options)[0], None)
            return outputs[self._window]

        module.forward = forward
        try:
            yield
        finally:
            del module.forward

    def _moments(self, block: nn.Module, name: str) -> Tensor:
        """Second moments of what the module `name` of `block` is given, float32 [columns, columns]."""
        sums: Tensor | None = None
        tokens = 0
        for state in self._windows():
            x = self._input(block, name, state)
            sums = x.new_zeros(x.shape[1], x.shape[1]) if sums is None else sums
            sums.addmm_(x.t(), x)
            tokens += len(x)
        assert sums is not None
        return sums.div_(tokens)

    def _all_moments(self, block: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """The same for several modules at once, in the block as it is."""
        sums: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            x = x.flatten(0, -2).float()
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            sums[name].addmm_(x.t(), x)

        handles = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, name=name: add(name, arguments[0])
            )
            for name in names
        ]
        for state in self._windows():
            block(state, **self._options)
        for handle in handles:
            handle.remove()
        tokens = sum(state.shape[1] for state in self._states)
        return {name: found.div_(tokens) for name, found in sums.items()}

    def _input(self, block: nn.Module, name: str, state: Tensor) -> Tensor:
        """What a module is given, float32 [tokens, columns]; nothing behind it is computed."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0])
            raise _Stop

        handle = block.get_submodule(name).register_forward_pre_hook(stop)
        try:
            with suppress(_Stop):
                block(state, **self._options)
        finally:
            handle.remove()
        return seen[0].flatten(0, -2).float()

    def _put(self, spec: TensorSpec, quantized: QuantizedTensor) -> None:
        for part in self._checkpoint.parts(spec):
            target = self._model.parameter(part.name)
            target.copy_(quantized.rows(part.start, part.stop).dequantize())

    # what is kept

    def _last_kept(self, layers: int) -> int:
        """The last block after which there are activations to go on from, it and all before it being whole; -1 if
        there are none.
        """
        whole = takewhile(lambda layer: self._kept.is_whole(f"layer-{layer}"), range(layers))
        return max((layer for layer in whole if self._kept.is_whole(f"states-{layer}")), default=-1)

    def _restore(self, layer: int) -> None:
        """Have what `layer` is given."""
        self._told("reading the text to calibrate with")
        self._states, self._options = self._model.embedded(
            self._text.ids if layer == 0 else self._text.ids[:1]
        )
        if layer > 0:
            stored = self._kept.load(f"states-{layer - 1}")["states"]
            self._states = list(stored.to(self._model.device).unsqueeze(1))

    def _keep(self, layer: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, quantized in self._found.items():
            tensors[f"{name}.codes"] = pack_int32(quantized.codes, quantized.scheme.bits)
            tensors[f"{name}.scale"] = quantized.scale
            if quantized.zero_point is not None:
                tensors[f"{name}.zero_point"] = quantized.zero_point
        tensors |= self._scales
        self._scales = {}
        self._kept.save(f"layer-{layer}", tensors)
        self._kept.save(f"states-{layer}", {"states": torch.cat(self._states)})
        self._kept.drop(f"states-{layer - 2}")  # one more than is needed, should the last be damaged

    def _read(self, layer: int) -> dict[str, QuantizedTensor]:
        stored, found = self._kept.load(f"layer-{layer}"), {}
        for fold in self._foldable.get(layer, []):
            self._folds.add(fold, stored[f"{fold.giver.name}.moved"])
        for specs in self._units[layer]:
            for spec in specs:
                if f"{spec.name}.codes" in stored:
                    scheme = self._schemes[spec.name]
                    codes = unpack_int32(stored[f"{spec.name}.codes"], scheme.bits, spec.shape[1])
                    zero_point = stored.get(f"{spec.name}.zero_point")
                    found[spec.name] = QuantizedTensor(
                        codes, stored[f"{spec.name}.scale"], zero_point, scheme
                    )
        return found


def folded(folder: Path, family: Family, dims: Dims) -> list[str]:
    """The scales that a calibration kept, a string for each of `Family.folds`, empty where there are none."""
    kept = KeptTensors(folder)

    @functools.cache
    def steps(layer: int) -> dict[str, Tensor]:
        name = f"layer-{layer}"
        found = kept.load(name) if kept.is_whole(name) else {}
        return {name: tensor for name, tensor in found.items() if name.endswith(".steps")}

    chosen = (steps(fold.layer).get(f"{fold.giver.name}.steps") for fold in family.folds(dims))
    return ["" if found is None else to_letters(found) for found in chosen]


@contextmanager
def _named(tensor: str) -> Iterator[None]:
    """Errors of a quantizer say which tensor it was given."""
    try:
        yield
    except QuantizationError as error:
        raise QuantizationError(f"{tensor} cannot be converted: {error}.") from None


class _Stop(Exception):
    pass


def _on_cpu(tensor: QuantizedTensor) -> QuantizedTensor:
    zero_point = None if tensor.zero_point is None else tensor.zero_point.cpu()
    return replace(tensor, codes=tensor.codes.cpu(), scale=tensor.scale.cpu(), zero_point=zero_point)
