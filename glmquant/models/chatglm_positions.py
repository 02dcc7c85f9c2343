"""What is peculiar to ChatGLM-6B's attention: positions in two rows, rotary angles of both, prefix masks.

A prompt is ``context... [gMASK] <sop>``; the answer follows ``<sop>``. A token has two positions::

    tokens    a   b   c   [gMASK]  <sop>  x   y
    row 0     0   1   2   3        3      3   3      index in the context; from <sop> on, that of [gMASK]
    row 1     0   0   0   0        1      2   3      0 in the context, then the index in the answer

Half of every attention head is rotated by row 0, the other half by row 1. Tokens of the context (row 1 is 0) see
each other in both directions, tokens of the answer see the context and what came before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from .chatglm_config import ChatGLMConfig

_ROTARY_BASE = 10000.0


def two_row_positions(
    config: ChatGLMConfig, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Positions of whole sequences, padded on either side.

    Args:
        config: gives the ids of ``<sop>``, ``[gMASK]`` and ``[MASK]``.
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 where a token is padding.

    Returns:
        int64 [batch, 2, length]; 0 in both rows of padding.

    Raises:
        UsageError: a row has no ``<sop>``, or neither ``[gMASK]`` nor ``[MASK]``.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise UsageError(
            f"attention_mask has shape {list(real.shape)} and input_ids {list(input_ids.shape)}: the positions of "
            "ChatGLM-6B follow from the whole conversation, so pass all of its ids."
        )
    starts = (input_ids == config.bos_token_id) & real
    gmasks = (input_ids == config.gmask_token_id) & real
    masks = (input_ids == config.mask_token_id) & real
    has_gmask = gmasks.any(-1)
    _every_row(starts.any(-1), f"no <sop> (id {config.bos_token_id})")
    _every_row(
        has_gmask | masks.any(-1),
        f"neither [gMASK] (id {config.gmask_token_id}) nor [MASK] (id {config.mask_token_id})",
    )
    index = real.cumsum(-1) - 1
    # argmax is the first of several. [MASK] counts only where there is no [gMASK], wherever it stands.
    blank = torch.where(has_gmask, gmasks.int().argmax(-1), masks.int().argmax(-1))
    answer = (starts.cumsum(-1) > 0) & real
    rows = torch.where(answer, index.gather(-1, blank[:, None]), index), answer.cumsum(-1)
    return torch.stack(rows, 1) * real[:, None]


def _every_row(has: Tensor, lacking: str) -> None:
    if not bool(has.all()):
        raise UsageError(
            f"row {has.tolist().index(False)} of input_ids has {lacking}; a prompt of ChatGLM-6B ends in [gMASK] "
            "<sop>, which its tokenizer appends."
        )


def hold_first_row(position_ids: Tensor) -> Tensor:
    """Positions [batch, 2, length] with row 0 kept where it was at ``<sop>``.

    For positions that were continued by counting on in both rows, which is what `generate` does.
    """
    first, second = position_ids.unbind(1)
    start = (second == 0).sum(-1, keepdim=True).clamp(max=second.shape[-1] - 1)
    return torch.stack((torch.where(second > 0, first.gather(-1, start), first), second), 1)


def rotary_tables(
    position_ids: Tensor, head_dim: int, dtype: torch.dtype, angles: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of two-row positions.

    THUDM's modeling_chatglm.py rounds the inverse frequencies to float16 when the model is built, in every dtype.
    In float16 it also computes the angles in float16, whose error grows with the position (0.3 in the cosine
    at 2047); this is how the weights were served, so it is the default here for float16. In float32 and bfloat16
    the angles are float32.

    Args:
        position_ids: [batch, 2, length].
        head_dim: width of a head; one half of it for each row.
        dtype: of the model, and of the result.
        angles: float16 or float32 to override the rule above.

    Returns:
        cos and sin, each [batch, 1, length, head_dim].
    """
    angles = angles or (torch.float16 if dtype == torch.float16 else torch.float32)
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=position_ids.device, dtype=torch.float32) / half
    inv_freq = (1.0 / _ROTARY_BASE**exponents).to(torch.float16).to(angles)
    theta = position_ids.transpose(1, 2)[..., None].to(angles) * inv_freq  # [batch, length, 2, head_dim / 4]
    theta = theta[..., None, :].expand(-1, -1, -1, 2, -1).flatten(2)[:, None]
    return theta.cos().to(dtype), theta.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [batch, heads, length, head_dim]; in either half, column j goes with j + head_dim/4."""
    first, second = states.view(*states.shape[:-1], 2, 2, -1).unbind(-2)
    return states * cos + torch.stack((-second, first), -2).flatten(-3) * sin


def padding_of(masked: Tensor, input_ids: Tensor, config: ChatGLMConfig) -> Tensor:
    """The attention mask [batch, length] behind THUDM's mask: a real token sees itself, padding does not.

    Raises:
        UsageError: the mask says something else than prompt, answer and padding.
    """
    masked = masked[:, 0] if masked.ndim == 4 else masked
    length = input_ids.shape[1]
    if masked.shape[-2:] == (length, length):
        real = ~masked.diagonal(dim1=-2, dim2=-1).expand(input_ids.shape)
        context = (two_row_positions(config, input_ids, real)[:, 1] == 0)[:, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=masked.device).tril()
        pairs = real[:, None] & real[:, :, None]
        if torch.equal(~masked & pairs, (causal | context) & pairs):
            return real.long()
    raise UsageError(
        f"generate cannot follow this attention_mask of shape {list(masked.shape)}: it takes [batch, length] with 0 "
        "for padding, or the mask that ChatGLM-6B's tokenizer makes."
    )
