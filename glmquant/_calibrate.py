"""Calibration: quantizing block by block with a view to what text does to the inputs of every layer.

Blocks are taken in order. The inputs of a block are what the *quantized* blocks before it have made of the text, and
inside of a block the output projection sees quantized q, k and v, and so on: what counts is what a layer does to the
inputs that it will get. (To correct every layer towards the original's output, as some do, was tried and left out: it
took twice the time and made things worse, on text of another kind much worse.)

At any time memory holds one block, the text's activations before and behind its attention, and the second moments of
one layer's inputs. After each block what has been found is written to a folder, from which a later run goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import families, formats
from ._kept import KeptTensors
from ._open import OpenedSource
from ._pace import Pace
from ._windows import CALIBRATION_SAMPLE, cut, read_text
from .checkpoint.source import TensorInfo
from .errors import QuantizationError
from .families import TensorSpec
from .models.blocks import BlockwiseModel
from .models.building import Checkpoint
from .models.loading import compute_dtype
from .packing import pack_int32, unpack_int32
from .plan import Plan
from .recipe import RANDOM, Calibration
from .scheme import QuantizedTensor
from .tokenizers.loading import load_tokenizer

if TYPE_CHECKING:
    from ._quantize import Task
    from .quantizers import Quantizer

_TEXT_PER_RANDOM = 3  # windows

Told = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationText:
    """Windows [windows, tokens] of a text, what a report says of them, and torch's threads before a conversion, which
    lowers their number.
    """

    ids: Tensor
    summary: Mapping[str, Any]
    threads: int


def calibration_text(calibration: Calibration, folder: Path, context: int) -> CalibrationText:
    """Windows spread evenly over the text, as the tokenizer of the model in `folder` cuts it, and random tokens.

    No text shows all that a model may be given. One window in four is of tokens drawn evenly from the whole vocabulary:
    what they move is not to be thrown away for the sake of the text. On text of another kind this takes a third off the
    damage, on text of the same kind it costs nothing. Random tokens alone, without any text, do better than any method
    that looks at weights only.

    Args:
        calibration: what is asked for.
        folder: holds the tokenizer.
        context: of the model; no window is longer.

    Raises:
        SourceError: the text cannot be read.
        UsageError: it is shorter than a window.
    """
    calibration = replace(calibration, window=min(calibration.window, context))
    alone = calibration.text == RANDOM
    text = "" if alone else read_text(calibration.text, sample=CALIBRATION_SAMPLE)
    tokenizer = load_tokenizer(folder)
    prefix = list(tokenizer.encode("", add_special_tokens=True))
    chosen = torch.empty(0, calibration.window, dtype=torch.int64)
    if not alone:
        ids = cut(text, tokenizer, calibration.window).ids
        count = min(calibration.windows, len(ids))
        chosen = ids[[number * len(ids) // count for number in range(count)]]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    size = (calibration.windows if alone else -(-len(chosen) // _TEXT_PER_RANDOM), calibration.window)
    drawn = plain[torch.randint(len(plain), size, generator=torch.Generator().manual_seed(0))]
    drawn[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    name = CALIBRATION_SAMPLE if calibration.text is None else Path(calibration.text).name
    summary = {
        "text": name,
        **({} if alone else {"sha256": hashlib.sha256(text.encode()).hexdigest()}),
        "windows": len(chosen),
        "random_windows": len(drawn),
        "window": calibration.window,
    }
    return CalibrationText(torch.cat([chosen, drawn]), summary, torch.get_num_threads())


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
        source = _Borrowed(opened)
        family = families.detect(source.config)
        self._checkpoint = Checkpoint(source, family, plan.dims, formats.get("safetensors"), {})
        dtype = torch.float32 if device.type == "cpu" else compute_dtype(None, self._checkpoint)
        self._model = BlockwiseModel(self._checkpoint, dtype, device)
        self._text, self._quantizer, self._told = text, quantizer, Pace(plan.dims.layers, told)
        self._kept = KeptTensors(kept)
        self._schemes = {
            item.source: item.scheme for item in plan.items if item.scheme is not None and not item.carried
        }
        self._units: dict[int | None, list[tuple[TensorSpec, ...]]] = {}
        for unit in family.units(plan.dims):
            self._units.setdefault(unit.tensors[0].layer, []).append(unit.tensors)
        self._layer = -1  # the last one that is done
        self._found: dict[str, QuantizedTensor] = {}
        self._states: list[Tensor] = []
        self._options: dict[str, Any] = {}
        self._window = 0  # at which the block is
        self._resumable = self._last_kept(plan.dims.layers)

    def prepared(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, those of linear layers with what they are quantized to. Takes one block at a time."""
        for task in tasks:
            item = task.item
            if item.layer is not None and item.source in self._schemes:
                self._advance(item.layer)
                first = item.start + task.start
                ready = self._found[item.source].rows(first, first + task.stop - task.start)
                yield replace(task, ready=ready)
            else:
                yield task

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
            part = ""
            for specs in self._units[layer]:
                name = self._checkpoint.parts(specs[0])[0].name.removesuffix(".weight")
                inside = name.removeprefix(self._model.path(block) + ".")
                if part and not inside.startswith(part + "."):
                    # The attention is done: what it gives is computed once, and not for every layer behind it.
                    kept.enter_context(self._computed_once(block.get_submodule(part)))
                part = inside.partition(".")[0]
                if specs[0].name not in self._schemes:
                    continue  # stays as it is
                self._told(f"calibrating {name}")
                moments = self._moments(block, inside)
                for spec in specs:
                    weight = self._checkpoint.source.read(spec.name).to(moments.device)
                    try:
                        quantized = self._quantizer(weight, self._schemes[spec.name], moments)
                    except QuantizationError as error:
                        raise QuantizationError(f"{spec.name} cannot be converted: {error}.") from None
                    self._put(spec, quantized)
                    found[spec.name] = _on_cpu(quantized)
            for index, state in enumerate(self._windows()):
                self._states[index] = block(state, **self._options)
            self._model.check(self._states, f"layer {layer}, quantized,")
        return found

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
        self._kept.save(f"layer-{layer}", tensors)
        self._kept.save(f"states-{layer}", {"states": torch.cat(self._states)})
        self._kept.drop(f"states-{layer - 2}")  # one more than is needed, should the last be damaged

    def _read(self, layer: int) -> dict[str, QuantizedTensor]:
        stored, found = self._kept.load(f"layer-{layer}"), {}
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


def mean_squares(
    opened: OpenedSource, calibration: Calibration, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Mean squares of what linear layers are given in the model as it is, float64 [columns], by the name of the first
    tensor of each of `glmquant.families.Family.units`. Memory holds one block; computed in float32 on the CPU.
    """
    source = _Borrowed(opened)
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


class _Stop(Exception):
    pass


class _Borrowed:
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


def _on_cpu(tensor: QuantizedTensor) -> QuantizedTensor:
    zero_point = None if tensor.zero_point is None else tensor.zero_point.cpu()
    return replace(tensor, codes=tensor.codes.cpu(), scale=tensor.scale.cpu(), zero_point=zero_point)
