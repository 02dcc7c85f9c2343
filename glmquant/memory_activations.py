"""What a forward pass holds at its widest point, in bytes.

Every sum lists the tensors that are alive at one line of the code: `glmquant.models.fused` and transformers'
``modeling_glm.py`` (5.23) for ChatGLM2 and later, `glmquant.models.chatglm` for ChatGLM-6B, and for the packed linear
layers `glmquant.ops.reference`. Widths are per token: h hidden, q all query heads, kv all key heads, f of the MLP.
torch's profiler finds the same bytes (``tests/test_memory_peaks.py``), but for what the compiled CPU kernels take from
the heap themselves; ``kernels/cpu/fixed.h`` says what. One thing is left out, which is a CPU's and no model's: scratch
of 0.1 to 1 MiB for every thread, of oneDNN's products in bfloat16, torch's attention and the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .families import Dims

Product = Literal[
    "dense", "kernel", "tiles", "wide tiles", "coded tiles", "level tiles", "whole", "whole int8"
]
"""How a layer is multiplied by: nothing is unpacked; a compiled CPU kernel; unpacked tile by tile, in float32 first,
codes first, by a table of levels; and bitsandbytes: unpacked whole, or in int8."""

# Weights in an unpacked tile: see glmquant/ops/reference.py.
_TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
_LOGITS_COPIES = 12  # bytes of float32 copies that sampling makes of a logit
_FEW_ROWS = 8  # up to which the compiled kernels never round activations to 8 bits


class Taken(NamedTuple):
    """Bytes at one point.

    Attributes:
        activations: of torch's allocator, as the next.
        workspace: unpacked weights and products with them.
        scratch: of a compiled kernel, which that allocator does not see.
    """

    activations: int
    workspace: int
    scratch: int

    @property
    def allocated(self) -> int:
        """What torch's allocator has given out."""
        return self.activations + self.workspace

    @classmethod
    def widest(cls, points: Iterable[Taken]) -> Taken:
        """Where most is allocated; and so much scratch beside it that the sum is the most of any point."""
        points = list(points)
        most = max(points, key=lambda taken: taken.allocated)
        return most._replace(scratch=max(map(sum, points)) - most.allocated)


@dataclass(frozen=True)
class Shape:
    """What the sums depend on.

    Attributes:
        dims: sizes of the model.
        first: it is ChatGLM-6B.
        item: bytes of an activation.
        half: activations are float16, which a CPU widens where no kernel multiplies.
        batch: sequences.
        context: tokens of each.
        device: ``cpu`` or ``cuda``.
        linear: how linear layers are multiplied by.
        head: the same of the head.
        short: kernels round the activations of long prompts to 8 bits.
        joint: attention is that of `glmquant.models.fused` on a CPU, which widens half and lets go of queries.
        grows: the cache grows by concatenation; else there is room for all of it.
    """

    dims: Dims
    first: bool
    item: int
    half: bool
    batch: int
    context: int
    device: Literal["cuda", "cpu"]
    linear: Product
    head: Product
    short: bool
    joint: bool
    grows: bool


def prefill_bytes(shape: Shape, chunk: int) -> Taken:
    """What a prompt takes of which `chunk` tokens are computed at once."""
    d, tokens = shape.dims, shape.batch * chunk
    h, f, q, kv = d.hidden, d.ffn, d.heads * d.head_dim, d.kv_heads * d.head_dim
    mask = shape.batch * chunk * shape.context if shape.first or chunk < shape.context else 0  # bool
    # ids, mask and positions as int64, cosines and sines
    kept = mask + tokens * (3 * 8 + (2 if shape.first else 1) * d.head_dim * shape.item)

    def phase(width: int, *layer: int, more: int = 0) -> Taken:
        """`width` activations of a token, `more` bytes, inside of a linear layer [out, in] if one is given."""
        inside = _product_bytes(shape, shape.linear, tokens, *layer) if layer else (0, 0)
        return Taken(kept + more + tokens * width * shape.item, *inside)

    # 4h: the embeddings, the layer's input, the second residual, the normed input of the MLP.
    if shape.first:
        points = [
            phase(4 * h + f, f, h),  # the first linear layer
            phase(4 * h + 2 * f),  # GELU
            phase(4 * h + f + h, h, f),  # the second
            # Embeddings, input, normed; query_key_value; both rotated, and three temporaries of the second rotation.
            phase(3 * h + 3 * h, 3 * h, h),
            phase(3 * h + 3 * h + 4 * h),
            phase(9 * h, h, h),
            phase(3 * h + 3 * h + 2 * h + h, more=mask * shape.item),  # the mask as numbers
        ]
    else:
        # Embeddings, input, normed. Keys and values of a growing cache count as cache before they are in it.
        before = 3 * h + (0 if shape.grows else 2 * kv)
        query = 0 if shape.joint else q
        separate = [phase(before - 2 * kv + q, q, h), phase(before + q, kv, h)]
        points = [
            phase(4 * h + 2 * f, 2 * f, h),
            phase(4 * h + 2 * f + 2 * f),  # gate and up, silu(gate), their product
            phase(4 * h + 2 * f + f + h, h, f),  # gate still holds both halves
            *([phase(before + q, q + 2 * kv, h)] if shape.joint else separate),
            # Cosines and sines; halves of the heads, rotated, of both; then they become whole heads of queries.
            phase(before + d.head_dim + q + (q + kv) // 2 + q),
            phase(3 * h + query + q + h, h, q),
            *_attending(shape, phase, chunk, mask),
        ]
    points.append(_head(shape, 2 * h * tokens * shape.item + kept))
    return Taken.widest(points)


def _attending(shape: Shape, phase: Callable[..., Taken], chunk: int, mask: int) -> list[Taken]:
    """Attention of ChatGLM2 and later: embeddings, input, normed; query, mixed values, and these once more in order."""
    d, tokens, keys = shape.dims, shape.batch * chunk, shape.batch * shape.context
    h, q, kv = d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim
    if shape.joint and shape.half:  # all in float32 but the query that comes and the values that go
        wide, sums = 4 * q * tokens, 4 * d.heads * tokens
        return [
            phase(3 * h + q, more=wide + 8 * kv * keys + wide + sums + mask * 4),
            phase(3 * h + q + q, more=wide),
        ]
    # With a mask, a GPU has keys and values repeated for every query head.
    repeated = 2 * q * keys * shape.item if shape.device == "cuda" and mask and d.kv_heads < d.heads else 0
    return [phase(3 * h + 3 * q, more=repeated + mask * shape.item)]


def decode_bytes(shape: Shape) -> Taken:
    """What one more token takes on a full cache."""
    d = shape.dims
    each = d.kv_heads * d.head_dim * shape.context * shape.batch
    # Keys, then values, of a layer are copied to a place that is one token larger.
    points = [_head(shape, 0), Taken(each * shape.item if shape.grows else 0, 0, 0)]
    if shape.half and shape.joint and shape.grows:
        points.append(Taken(2 * each * 4, 0, 0))  # both, in float32
    return Taken.widest(points)


def _head(shape: Shape, live: int) -> Taken:
    """The logits of the last token, and sampling's copies of them."""
    rows, vocab = shape.batch, shape.dims.vocab
    inside = _product_bytes(shape, shape.head, rows, vocab, shape.dims.hidden)
    return Taken(live + rows * vocab * (shape.item + _LOGITS_COPIES), *inside)


def _product_bytes(shape: Shape, how: Product, tokens: int, rows: int, columns: int) -> tuple[int, int]:
    """Workspace and scratch of a layer [rows, columns], beyond its input and output."""
    if how == "dense":
        return 0, 0
    if how == "kernel":
        planes = 3 if shape.item == 4 else 1 if shape.short and tokens > _FEW_ROWS else 2
        # Bytes; for every 32 of them a scale, their sum, and for each plane the sum of its bytes.
        return 0, tokens * (planes * (columns + 64) + columns // 32 * 4 * (2 + planes))
    if how == "whole":
        return rows * columns * shape.item, 0
    if how == "whole int8":
        return tokens * (columns + 4 * rows), 0  # activations as bytes, and sums as int32
    high = min(rows, max(1, _TILE[shape.device] // columns))
    tile = high * columns
    unpacking = tile * (shape.item + (4 if how == "wide tiles" else 1 if how == "coded tiles" else 0))
    if how == "level tiles":  # indices of two bytes with the table's float32; then float32 and the result
        unpacking = tile * 6
    if high < rows:
        unpacking += tile * shape.item  # the tile before, until this one is there
    if shape.device == "cuda":  # the product is where it belongs at once
        return unpacking, 0
    if shape.half and tokens > 1:
        return 4 * tokens * columns + max(unpacking, tile * (2 + 4) + tokens * high * 4), 0
    return max(unpacking, (tile + tokens * high) * shape.item), 0
