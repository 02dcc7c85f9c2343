"""q, k and v of every layer in one product.

Three products with the same activations cost three preparations of them and three launches; one costs one. The three
layers stay what they are, under their names: `fuse` only moves their weights next to each other, and an attention
that finds them so multiplies by all at once. Whatever happens to the layers afterwards (another dtype or device,
``quantize``, a LoRA on one of them, hooks), it notices, and calls them one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.glm import modeling_glm as glm
from transformers.models.glm4 import modeling_glm4 as glm4

from .. import ops
from .._pages import in_huge_pages
from .quantized import QuantizedLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Let the attentions of a GLM model compute q, k and v together, in place.

    Names, values and the size of parameters stay as they are; meanwhile one layer's q, k and v are in memory twice.
    Calling it again is harmless, and of use after the model was moved or quantized. Attentions that have no such
    layers, layers of different schemes, and such as are not in memory, are left alone.
    """
    for attention in model.modules():
        kind = next((new for old, new in _FUSED.items() if type(attention) in (old, new)), None)
        if kind is None:
            continue
        layers = [getattr(attention, name) for name in _PROJECTIONS]
        if not _alike(layers):
            continue
        if _whole(layers) is None:
            for name in _names(layers[0]):
                _join([getattr(layer, name) for layer in layers])
        attention.__class__ = kind
        attention._joined = None  # type: ignore[assignment]


def _names(layer: nn.Module) -> list[str]:
    """Its parameters; rows of all of them are rows of the weight."""
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter is not None]


def _alike(layers: list[Any]) -> bool:
    first = layers[0]
    if type(first) not in (nn.Linear, QuantizedLinear) or any(
        type(layer) is not type(first) for layer in layers
    ):
        return False
    if type(first) is QuantizedLinear and (
        not first.has_kernels
        or first.weight_operands.layout is not ops.Layout.FILE  # for a GPU: the business of `arranging`
        or any(layer.scheme != first.scheme for layer in layers)
    ):
        return False
    if any(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or hasattr(layer, "_hf_hook")
        or layer._backward_hooks
        for layer in layers
    ):
        return False
    parameters = [[getattr(layer, name) for layer in layers] for name in _names(first)]
    return all(_names(layer) == _names(first) for layer in layers) and all(
        p.device == group[0].device and p.dtype == group[0].dtype and not p.is_meta and p.is_contiguous()
        for group in parameters
        for p in group
    )


def _join(parts: list[nn.Parameter]) -> None:
    """Move parameters next to each other."""
    whole = parts[0].data.new_empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if whole.device.type == "cpu":
        in_huge_pages(whole)
    start = 0
    for part in parts:
        place = whole[start : start + part.shape[0]]
        part.data = place.copy_(part.data)
        start += part.shape[0]


def _whole(layers: list[Any]) -> dict[str, Tensor] | None:
    """The joined parameters by their names, sharing memory; None where they are not next to each other."""
    joined = {}
    for name in _names(layers[0]):
        parts: list[Tensor] = [getattr(layer, name).data for layer in layers]
        end = parts[0].data_ptr()
        for part in parts:
            if (
                part.data_ptr() != end
                or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
            ):
                return None
            end += part.nbytes
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        joined[name] = parts[0].as_strided(shape, parts[0].stride(), parts[0].storage_offset())
    return joined


class _JointMixin:
    """An attention that computes q, k and v in one product as long as the layers are as `fuse` left them."""

    _joined: tuple[tuple[int, ...], list[Tensor | None]] | None = None

    def joint_operands(self) -> list[Tensor | None] | None:
        """The parameters of q, k and v as one layer's, in the order of `_ORDER`; None where they are not next to each
        other, or are to be computed one by one.
        """
        layers = [self._modules[name] for name in _PROJECTIONS]  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or not _alike(layers):
            return None
        places = tuple(p.data_ptr() for layer in layers for p in layer._parameters.values() if p is not None)
        if self._joined is None or self._joined[0] != places:
            whole = _whole(layers) or {}
            self._joined = places, [whole.get(name) for name in _ORDER[type(layers[0])]]
        return None if self._joined[1][0] is None else self._joined[1]

    def joint(self) -> Callable[[Tensor], Tensor] | None:
        """What computes q, k and v, [..., in] -> [..., all rows]; None where they are to be computed one by one."""
        operands = self.joint_operands()
        if operands is None:
            return None
        first: Any = self._modules[_PROJECTIONS[0]]  # type: ignore[attr-defined]
        if type(first) is nn.Linear:
            weight, bias = operands
            assert weight is not None
            return functools.partial(functional.linear, weight=weight, bias=bias)
        packed, scale, zero_point, bias = operands
        assert packed is not None
        assert scale is not None
        return functools.partial(
            ops.linear, weight_packed=packed, weight_scale=scale, weight_zero_point=zero_point, bias=bias,
            bits=first.scheme.bits,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own."""
        this: Any = self
        compute = None if torch.is_grad_enabled() else self.joint()
        if compute is None:
            others = (position_embeddings, attention_mask, past_key_values)
            found: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *others, **kwargs)  # type: ignore[misc]
            return found
        joint = compute(hidden_states)
        shape = hidden_states.shape[:-1]
        heads = joint.view(*shape, -1, this.head_dim).transpose(1, 2)
        groups = this.config.num_key_value_heads
        query, key, value = heads.split((heads.shape[1] - 2 * groups, groups, groups), dim=1)  # type: ignore[no-untyped-call]
        query, key = glm.apply_rotary_pos_emb(query, key, *position_embeddings)
        del joint, heads  # the widest point is still to come
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, this.layer_idx)
        kind = this.config._attn_implementation
        plain = not (this.training or kwargs.get("cache") or kwargs.get("output_attentions"))
        if kind == "sdpa" and query.device.type == "cpu" and plain:
            mixed = attend_on_cpu(query, key, value, attention_mask, this.scaling)
            del query, key, value
            return this.o_proj(mixed), None
        attend = glm.ALL_ATTENTION_FUNCTIONS.get_interface(kind, glm.eager_attention_forward)
        options = {"dropout": this.attention_dropout if this.training else 0.0, "scaling": this.scaling}
        mixed, weights = attend(this, query, key, value, attention_mask, **options, **kwargs)
        return this.o_proj(mixed.reshape(*shape, -1)), weights


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention on a CPU, [batch, heads, length, width] -> [batch, length, heads * width].

    Heads that share a key are handed over as rows of one head where there is one position, and half is computed as
    float32: either makes torch ten times faster (8 layers, 256 positions: 12 ms of a token).
    """
    batch, heads, length, width = query.shape
    dtype = query.dtype
    if dtype == torch.float16:
        query, key, value = query.float(), key.float(), value.float()
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
    if length == 1 and (mask is None or mask.shape[1] == 1):
        rows = query.view(batch, key.shape[1], -1, width)
        mixed = functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    else:
        causal = mask is None and length > 1
        mixed = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
    del key, value
    if dtype == torch.float16:
        del query
    mixed = mixed.reshape(batch, heads, length, width).transpose(1, 2)
    return mixed.to(dtype, memory_format=torch.contiguous_format).reshape(batch, length, -1)


class JointGlmAttention(_JointMixin, glm.GlmAttention):
    """See `fuse`."""


class JointGlm4Attention(_JointMixin, glm4.Glm4Attention):
    """See `fuse`."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    glm.GlmAttention: JointGlmAttention,
    glm4.Glm4Attention: JointGlm4Attention,
}
_ORDER = {
    nn.Linear: ("weight", "bias"),
    QuantizedLinear: ("weight_packed", "weight_scale", "weight_zero_point", "bias"),
}
