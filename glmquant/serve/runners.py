"""One forward pass for many requests: what runs the model under the engine.

`SlotRunner` is for the GLM models of transformers. A step is one row of tokens from all requests: one token from each
that is answering, and a chunk of the prompt from each that is new. All layers but attention treat tokens alike, so
they see one matrix; attention takes each request by itself, on the keys and values in its slot. On a CPU this is as
fast as a padded batch with a mask where lengths are equal, many times faster where they are not.

On a CPU tokens of answers take a way of their own, that of `generate`: a few calls instead of many operations, with
the same bits as if each were alone (packed weights, up to 16 requests; beyond, up to the order of sums). What prompts
are cut into still depends on who else is there, and with it their rounding.

`SerialRunner` is for ChatGLM-6B, whose prompts cannot be read in chunks: their tokens see each other both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from ..models import step as one_token
from ..models.compiled import compiled_layers
from ..models.fused import attend_on_cpu
from ..ops import decoding_native

_ATTENTION = "glmquant_slots"


@dataclass(frozen=True)
class Piece:
    """Tokens of one request in a step.

    Attributes:
        slot: of the request.
        ids: the tokens.
        start: position of the first one.
        wanted: whether the logits after the last one are.
    """

    slot: int
    ids: Sequence[int]
    start: int
    wanted: bool = True


class Runner(Protocol):
    """What the engine needs of a model.

    Attributes:
        slots: requests at a time.
        context: tokens of each.
        chunk: tokens of a step; None where a prompt is read at once.
        reuses: whether what a slot holds may be the beginning of another request.
    """

    slots: int
    context: int
    chunk: int | None
    reuses: bool

    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """Advance; logits [pieces that want them, vocab] in float32, in the order of the pieces."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Let slot `target` begin with the first `count` tokens of slot `source`."""


class SlotRunner:
    """See the module.

    Args:
        model: a `GlmForCausalLM` or `Glm4ForCausalLM`; its attention is replaced, so it is the runner's from now on.
        slots: requests at a time.
        context: tokens of each.
        chunk: tokens of a step.
    """

    reuses = True

    def __init__(self, model: Any, slots: int, context: int, chunk: int) -> None:
        self.slots, self.context = slots, context
        self.chunk: int | None = chunk
        self._model = model
        config = model.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (slots, heads, context, config.head_dim)
        # Not filled: pages that no request has reached take no memory on a CPU.
        self._keys, self._values = (
            [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(layers)]
            for _ in range(2)
        )
        model.set_attn_implementation(_ATTENTION)
        self._joint, self._compiled = None, None
        if decoding_native.why_not(model.device) is None and one_token.why_not(model) is None:
            self._joint = one_token.joint_projections(model)
            self._compiled = compiled_layers(model, self._keys, self._values)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """See `Runner`."""
        if self._joint is None:
            return self._read(pieces)
        answering = [len(piece.ids) == 1 and piece.wanted for piece in pieces]
        single, others = (
            [p for p, a in zip(pieces, answering, strict=True) if a is kind] for kind in (True, False)
        )
        if not others:
            return self._decoded(single, self._joint)
        read = self._read(others)
        if not single:
            return read
        order = [a for a, piece in zip(answering, pieces, strict=True) if piece.wanted]
        logits = read.new_empty(len(order), read.shape[1])
        logits[torch.tensor(order)] = self._decoded(single, self._joint)
        logits[~torch.tensor(order)] = read
        return logits

    def _read(self, pieces: Sequence[Piece]) -> Tensor:
        """A step through the layers of transformers."""
        device = self._model.device
        layout = _Layout(pieces, self._keys, self._values, device)
        ids = [row for piece in pieces for row in piece.ids]
        hidden = self._model.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=layout.positions[None],
            use_cache=False,
            layout=layout,
        ).last_hidden_state[0]
        logits: Tensor = self._model.lm_head(hidden[layout.wanted])
        return logits.float()

    def _decoded(self, pieces: Sequence[Piece], joint: Sequence[one_token.Joint | None]) -> Tensor:
        """A step in which everybody has one token, on a CPU."""
        slots, columns, tokens = (
            torch.tensor(row) for row in zip(*((p.slot, p.start, p.ids[0]) for p in pieces), strict=True)
        )
        compiled, heads = self._compiled, self._model.config.num_attention_heads
        if compiled is not None and compiled.objection(len(pieces)) is None:

            def layers(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
                return compiled(hidden, cos, sin, columns, slots=slots)

            return one_token.decode(self._model, tokens, columns, layers).float()

        def attend(index: int, qkv: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> Tensor:
            keys, values = self._keys[index], self._values[index]
            query = decoding_native.rotate_and_store(qkv, cos, sin, heads, keys, values, columns, slots)
            return decoding_native.attend(query, keys, values, columns, scaling, slots=slots)

        each = one_token.one_by_one(self._model, joint, attend)
        return one_token.decode(self._model, tokens, columns, each).float()

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Runner`."""
        for cached in (*self._keys, *self._values):
            cached[target, :, :count] = cached[source, :, :count]


class _Layout:
    """Where the tokens of a step belong."""

    def __init__(
        self, pieces: Sequence[Piece], keys: list[Tensor], values: list[Tensor], device: torch.device
    ) -> None:
        self._keys, self._values = keys, values
        self._bounds: list[tuple[int, int, int, int]] = []  # slot, tokens from, to, length of the slot then
        self._masks: list[Tensor | None] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for piece in pieces:
            first, count = len(slots), len(piece.ids)
            slots += [piece.slot] * count
            positions += range(piece.start, piece.start + count)
            if piece.wanted:
                wanted.append(len(slots) - 1)
            self._bounds.append((piece.slot, first, first + count, piece.start + count))
            self._masks.append(_causal(count, piece.start, device) if count > 1 and piece.start else None)
        self._slots, self.positions, self.wanted = (
            torch.tensor(rows, dtype=torch.long, device=device) for rows in (slots, positions, wanted)
        )
        # Requests of one token, which the CPU's kernel takes at once.
        self._together: Tensor | None = None
        if decoding_native.why_not(device) is None:
            single = [first for _, first, last, _ in self._bounds if last - first == 1]
            self._together = torch.tensor(single, dtype=torch.long)
            self._their_slots, self._their_last = self._slots[single], self.positions[single]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Queries [heads, tokens, dim], keys and values [kv heads, tokens, dim] -> [tokens, heads, dim]."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._slots, :, self.positions] = key.transpose(0, 1)
        values[self._slots, :, self.positions] = value.transpose(0, 1)
        heads, tokens, dim = query.shape
        kv_heads = key.shape[0]
        # Heads of a group share keys and values: as rows beside each other for one token, else as a batch whose
        # keys and values are the same memory.
        grouped = query.view(kv_heads, heads // kv_heads, tokens, dim)
        result = query.new_empty(tokens, heads, dim)
        if self._together is not None and len(self._together):
            result[self._together] = decoding_native.attend(
                query[:, self._together].transpose(0, 1), keys, values, self._their_last, scaling,
                slots=self._their_slots,
            ).view(-1, heads, dim)  # fmt: skip
        for (slot, first, last, length), mask in zip(self._bounds, self._masks, strict=True):
            k, v = keys[slot, :, :length], values[slot, :, :length]
            q = grouped[:, :, first:last]
            if last - first == 1 and self._together is not None:
                continue
            if query.device.type == "cpu":
                found = attend_on_cpu(query[None, :, first:last], k[None], v[None], mask, scaling)
                result[first:last] = found.view(last - first, heads, dim)
            elif last - first == 1:
                mixed = functional.scaled_dot_product_attention(
                    q[None, :, :, 0], k[None], v[None], scale=scaling
                )
                result[first] = mixed[0].reshape(heads, dim)
            else:
                batch = heads // kv_heads, -1, -1, -1
                mixed = functional.scaled_dot_product_attention(
                    q.transpose(0, 1), k.expand(*batch), v.expand(*batch),
                    attn_mask=mask, is_causal=mask is None, scale=scaling,
                )  # fmt: skip
                result[first:last] = mixed.permute(2, 1, 0, 3).reshape(last - first, heads, dim)
        return result


def _causal(count: int, start: int, device: torch.device) -> Tensor:
    """Who is seen by `count` tokens from position `start` on: bool [count, start + count]."""
    rows = torch.arange(start, start + count, device=device)[:, None]
    return torch.arange(start + count, device=device) <= rows


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    *,
    scaling: float,
    layout: _Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    return layout.attend(module.layer_idx, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)


class SerialRunner:
    """One request at a time, for any model with a cache; see the module.

    Args:
        model: what `glmquant.load` returns for ChatGLM-6B.
        context: tokens of a request.
    """

    slots = 1
    chunk: int | None = None
    reuses = False

    def __init__(self, model: Any, context: int) -> None:
        self.context = context
        self._model = model
        self._cache: DynamicCache | None = None
        self._positions = torch.empty(0)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """See `Runner`."""
        from ..models.chatglm_positions import two_row_positions

        (piece,) = pieces
        ids = torch.tensor([piece.ids], device=self._model.device)
        if piece.start == 0:
            self._cache = DynamicCache(config=self._model.config)
            positions = two_row_positions(self._model.config, ids)
            self._positions = positions[:, :, -1:]
        else:
            positions = self._positions + torch.tensor([[[0], [1]]], device=ids.device)
            self._positions = positions
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def copy(self, source: int, target: int, count: int) -> None:
        """Nothing to do: the only slot has what it has."""
