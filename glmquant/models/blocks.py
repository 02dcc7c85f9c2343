"""Running a checkpoint block by block, so that a model of any size computes in the memory of one block.

`glmquant.load` holds a whole model. To compare two of them on many windows of text it is enough to hold one block of
one model, and what all windows have become so far: [tokens, hidden] for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..families import Role, TensorSpec
from .building import Checkpoint, build
from .loading import check_tied, fill, let_go
from .placement import Placement


class BlockwiseModel:
    """A model without weights, into which they come block by block.

    Args:
        checkpoint: where they come from.
        dtype: what the model computes in.
        device: where; see `glmquant.load`.

    Attributes:
        blocks: how many pieces it is run in: the embedding, every layer, the last norm, the head.
        vocab: rows of the head.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str | int) -> None:
        self._checkpoint = checkpoint
        self._model = build(checkpoint, dtype).eval()
        self._placement = Placement(self._model, device, None, None, None, checkpoint.source.folder)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._placement.device))
        self.blocks = checkpoint.dims.layers + 3
        self.vocab = checkpoint.dims.vocab

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._placement.device

    @torch.no_grad()
    def hidden_states(self, windows: Tensor, done: Callable[[str], None]) -> list[Tensor]:
        """What the head sees.

        Args:
            windows: token ids [windows, length], none of them padding.
            done: is called with a name after each block.

        Returns:
            For each window [length, hidden], after the last norm.

        Raises:
            ModelError: numbers that are none came out of a block.
        """
        states, options = self.embedded(windows)
        done("embedding")
        for number in range(self._checkpoint.dims.layers):
            with self.layer(number) as block:
                for index, state in enumerate(states):
                    states[index] = block(state, **options)
            self.check(states, f"layer {number}")
            done(f"layer {number}")
        with self.last_norm() as norm:
            states = [norm(state) for state in states]
        self.check(states, "the last norm")
        done("the last norm")
        return [state[0] for state in states]

    @torch.no_grad()
    def embedded(self, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """What the first layer is given: for each window [1, length, hidden], and the options of every layer."""
        with self._filled(s for s in self._checkpoint.present() if s.role is Role.EMBEDDING):
            states, options = self._embed(windows)
        self.check(states, "the embedding")
        return states, options

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """A transformer block, in memory inside of the ``with``."""
        with self._filled(s for s in self._checkpoint.present() if s.layer == number):
            yield self._model.base_model.layers[number]

    def path(self, block: nn.Module) -> str:
        """The name of a module in the model."""
        return str(next(path for path, module in self._model.named_modules() if module is block))

    def parameter(self, name: str) -> Tensor:
        """A parameter of what is in memory, to be written to."""
        found: Tensor = self._model.get_parameter(name).data
        return found

    @contextmanager
    def last_norm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The norm behind the last layer, in memory inside of the ``with``."""
        base, ends = self._model.base_model, (Role.EMBEDDING, Role.HEAD)
        with self._filled(s for s in self._checkpoint.present() if s.layer is None and s.role not in ends):
            yield base.norm if hasattr(base, "norm") else base.final_layernorm

    @contextmanager
    @torch.no_grad()
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The output head, [rows, hidden] -> logits [rows, vocab], in memory inside of the ``with``."""
        specs = list(self._checkpoint.present())
        head = next((spec for spec in specs if spec.role is Role.HEAD), None)
        if head is None or self._checkpoint.dims.tied_head:
            if head is not None:
                check_tied(self._checkpoint, head)
            head = next(spec for spec in specs if spec.role is Role.EMBEDDING)
        with self._filled([head]):
            yield self._model.get_output_embeddings()

    @contextmanager
    def _filled(self, specs: Iterable[TensorSpec]) -> Iterator[None]:
        names = [n for s in specs for n in fill(self._model, self._checkpoint, s, self._placement)]
        yield
        for name in names:
            self._placement.release(name)
        let_go(self._checkpoint)

    def _embed(self, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """Embedded windows [1, length, hidden], and what else a layer is given: the same for every window."""
        base = self._model.base_model
        recorder = _Recorder()
        norm = "norm" if hasattr(base, "norm") else "final_layernorm"
        usual = base.layers, getattr(base, norm)
        base.layers = nn.ModuleList([recorder])
        setattr(base, norm, nn.Identity())
        states = []
        for window in windows:
            ids = window[None].to(self.device)
            states.append(base(input_ids=ids, use_cache=False).last_hidden_state)
        base.layers = usual[0]
        setattr(base, norm, usual[1])
        return states, recorder.options

    def check(self, states: Iterable[Tensor], where: str, first: int = 0) -> None:
        """Refuse what is no number.

        Args:
            states: of windows of the text, from window `first` on.
            where: what computed them, for the message.
            first: see `states`.

        Raises:
            ModelError: naming the folder, the window and `where`.
        """
        for index, state in enumerate(states, first):
            if not state.isfinite().all():
                raise ModelError(
                    f"{self._checkpoint.source.folder} is at fault: {where} gives NaN or infinity in window {index} of "
                    f"the text (computing in {str(self._model.dtype).removeprefix('torch.')}). Run `glmquant verify` "
                    "on the folder; if it is sound, another dtype may hold its numbers."
                )


class _Recorder(nn.Module):
    """Stands in for the layers, and keeps what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        self.options = options
        return hidden_states
