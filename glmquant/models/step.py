"""One token for every sequence of a batch, as little else as possible: `DecodeStep`.

transformers' model computes a prompt, whose keys and values go to memory of a fixed size. From there on each token is
the same list of launches on the same memory, which on a GPU is recorded once, as a CUDA graph: launching them one by
one takes a processor longer than a GPU takes to run them. On a CPU it is a fifth of the operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer
from transformers.models.glm.modeling_glm import GlmAttention, GlmForCausalLM

from .. import ops
from ..memory_cache import capacity_for, grown
from ..ops import decoding
from ..ops.native import rows_alone
from .arranging import joined
from .compiled import compiled_layers
from .fused import JointGlmAttention
from .quantized import PARTS, QuantizedEmbedding

Joint = Callable[[Tensor], Tensor]
Layers = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Hidden states [rows, hidden], cosines and sines [rows, rotary] -> the states behind the last layer, and what is still
to be added to them."""
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Keeps keys and values and attends to them: the number of a layer, its q, k and v side by side, cosines and sines, and
the scale -> [rows, heads * width]."""


class DecodeStep:
    """A model, a batch size and a cache.

    Args:
        model: one that `why_not` has nothing against; it is not kept alive.
        rows: sequences.
        columns: tokens of a sequence that there is room for at first; the cache grows.

    Attributes:
        rows: sequences.
        capacity: columns of the cache.
    """

    @torch.inference_mode(False)  # what it holds is written to, whether in inference mode or not
    def __init__(self, model: Any, rows: int, columns: int) -> None:
        config = model.config
        self._owner = weakref.ref(model)
        self._device: torch.device = model.device
        self._heads = config.num_attention_heads
        self.rows, self.capacity = rows, capacity_for(columns)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, self.capacity, config.head_dim)
        self._keys = torch.zeros(shape, dtype=model.dtype, device=self._device)
        self._values = torch.zeros_like(self._keys)
        self._tokens, self._positions, self._first = (
            torch.zeros(rows, dtype=torch.int64, device=self._device) for _ in range(3)
        )
        self._column = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._length, self._longest = 0, columns
        self._layers: Layers | None = None  # between `start` and `end`, as they hold weights
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, with the room that there is."""
        return self._keys.nbytes + self._values.nbytes

    def prompt_layers(self, columns: int) -> list[Any]:
        """Layers for a cache of transformers, which put keys and values of a prompt of `columns` where they stay."""
        if columns > self.capacity:
            self._grow(capacity_for(columns))
        return [_PromptLayer(*layer) for layer in zip(self._keys, self._values, strict=True)]

    @torch.no_grad()
    def start(self, columns: int, mask: Tensor | None, longest: int) -> None:
        """Go on after a prompt that was computed with `prompt_layers`.

        Args:
            columns: of the prompt.
            mask: [rows, columns], 0 where a column is padding, which is on the left; None if none is.
            longest: tokens of a sequence, prompt and answer, beyond which there is to be no room.
        """
        self._length, self._longest = columns, longest
        self._column.fill_(columns - 1)
        if mask is None:
            self._first.zero_()
        else:
            self._first.copy_(mask.shape[1] - mask.sum(-1))
        torch.sub(self._column, self._first, out=self._positions)
        self._layers = self._layers_now()

    def end(self) -> None:
        """The answer is complete. The cache stays, for the next one."""
        self._layers = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The next tokens int64 [rows] -> logits [rows, vocabulary], which the next call overwrites."""
        if self._length == self.capacity:
            self._grow(grown(self.capacity, self._longest))  # seldom, since it is recorded anew
            self._layers = self._layers_now()
        self._length += 1
        self._tokens.copy_(tokens)
        if self._device.type != "cuda":
            return self._compute()
        if self._graph is None:
            self._record()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        """Room for more; what was recorded is of no use any more."""
        self._graph = self._logits = None
        missing = capacity - self.capacity
        self._keys = functional.pad(self._keys, (0, 0, 0, missing))
        self._values = functional.pad(self._values, (0, 0, 0, missing))
        self.capacity = capacity

    def _record(self) -> None:
        """Run once, for everything to be compiled and allocated, then record; neither is to count as a token."""
        place = self._column.clone(), self._positions.clone()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            for _ in range(2):
                self._compute()
                self._column.copy_(place[0])
                self._positions.copy_(place[1])
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph):
            self._logits = self._compute()
        self._graph = graph

    def _compute(self) -> Tensor:
        assert self._layers is not None
        self._column.add_(1)
        self._positions.add_(1)
        return decode(self._owner(), self._tokens, self._positions, self._layers)

    def _layers_now(self) -> Layers:
        model: Any = self._owner()
        compiled = compiled_layers(model, self._keys.unbind(), self._values.unbind())
        if compiled is None or compiled.objection(self.rows):
            return one_by_one(model, joint_projections(model), self._attend)

        def run(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            columns = self._column.expand(self.rows).contiguous()
            return compiled(hidden, cos, sin, columns, first=self._first)

        return run

    def _attend(self, index: int, qkv: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> Tensor:
        length = None if self._device.type == "cuda" else self._length
        cache = decoding.Cache(self._keys[index], self._values[index], self._first, self._column, length)
        query = decoding.rotate_and_store(qkv, cos, sin, self._heads, cache)
        return decoding.attend(query, cache, scaling)


def decode(model: Any, tokens: Tensor, positions: Tensor, layers: Layers) -> Tensor:
    """The next token of each of some sequences.

    Args:
        model: one that `why_not` has nothing against.
        tokens: int64 [rows].
        positions: int64 [rows].
        layers: the model's, and what they attend to.

    Returns:
        Logits, [rows, vocabulary].
    """
    base = model.model
    hidden = base.embed_tokens(tokens[:, None])[:, 0]
    cos, sin = (t[:, 0] for t in base.rotary_emb(hidden, position_ids=positions[:, None]))
    with rows_alone():
        hidden, delta = layers(hidden, cos, sin)
        logits: Tensor = model.lm_head(_norm(base.norm, hidden, delta))
    return logits


def one_by_one(model: Any, joint: Sequence[Joint | None], attend: Attend) -> Layers:
    """The layers of a model, each as a few launches or calls.

    Args:
        model: one that `why_not` has nothing against.
        joint: see `joint_projections`.
        attend: see `Attend`.
    """

    def run(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        delta = None
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            x = _norm(layer.input_layernorm, hidden, delta)
            qkv = _projected(attention, joint[index], x)
            delta = attention.o_proj(attend(index, qkv, cos, sin, attention.scaling))
            x = _norm(layer.post_attention_layernorm, hidden, delta)
            delta = layer.mlp.down_proj(decoding.silu_product(layer.mlp.gate_up_proj(x)))
        assert delta is not None
        return hidden, delta

    return run


def joint_projections(model: Any) -> list[Joint | None]:
    """For each layer what computes q, k and v at once, on a CPU; it holds their weights."""
    attentions = (layer.self_attn for layer in model.model.layers)
    return [a.joint() if isinstance(a, JointGlmAttention) else None for a in attentions]


class _PromptLayer(DynamicLayer):
    """A layer of a cache that holds a prompt, computed at once, in memory of another.

    Args:
        keys: [rows, groups, capacity, width].
        values: the same.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._room = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep them; attention is to them alone, where they are kept."""
        length = key_states.shape[2]
        self.keys, self.values = (room[:, :, :length] for room in self._room)
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.is_initialized = True
        return self.keys, self.values


def why_not(model: Any) -> str | None:
    """Why `DecodeStep` cannot be used for a model, as the end of a sentence; None where it can."""
    if not isinstance(model, GlmForCausalLM):
        return f"it is for ChatGLM2, ChatGLM3 and GLM-4-9B, and this is {type(model).__name__}"
    if len({parameter.device for parameter in model.parameters()}) != 1 or hasattr(model, "hf_device_map"):
        return "the model is spread over devices"
    if len(_dtypes(model)) > 1:
        return "its parameters are of several dtypes"
    if model.training:
        return "the model is in training mode"
    if model.config.hidden_act != "silu":
        return f"its activation function is {model.config.hidden_act}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "there are hooks on it"
    if any(not isinstance(layer.self_attn, GlmAttention) for layer in model.model.layers):
        return "its attention has been replaced"
    return None


def _dtypes(model: Any) -> set[torch.dtype]:
    """What it computes in; packed weights and their scales have dtypes of their own."""
    found = {p.dtype for name, p in model.named_parameters() if not name.endswith(PARTS)}
    embedding = model.model.embed_tokens
    return found | ({embedding.dtype} if isinstance(embedding, QuantizedEmbedding) else set())


def _norm(norm: Any, hidden: Tensor, delta: Tensor | None) -> Tensor:
    return decoding.rms_norm(hidden, norm.weight, norm.variance_epsilon, delta)


def _projected(attention: Any, joint: Joint | None, x: Tensor) -> Tensor:
    """q, k and v side by side, in one product where they are side by side in memory."""
    if joint is not None:
        return joint(x)
    found = joined(attention)
    if found is None:
        return torch.cat((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)), dim=-1)
    weight, bits = found.weight, attention.q_proj.scheme.bits
    return ops.linear(x, weight.packed, weight.scale, weight.zero_point, found.bias, bits)
