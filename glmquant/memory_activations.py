"""What a forward pass holds at its widest point, in bytes.

Every sum lists the tensors that are alive at one line of the code: transformers' ``modeling_glm.py`` (5.23) for
ChatGLM2 and later, `glmquant.models.chatglm` for ChatGLM-6B, and for the packed linear layers
`glmquant.ops.reference`. Widths are per token: h hidden, q all query heads, f of the MLP. torch's profiler finds the
same bytes (``tests/test_memory_peaks.py``). One thing is left out, which is a CPU's and no model's: scratch of oneDNN's
products in bfloat16, 0.1 to 1 MiB for every thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .families import Dims

# Weights in an unpacked tile: see glmquant/ops/reference.py.
_TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
_LOGITS_COPIES = 12  # bytes of float32 copies that sampling makes of a logit


@dataclass(frozen=True)
class Shape:
    """What the sums depend on.

    Attributes:
        dims: sizes of the model.
        first: it is ChatGLM-6B.
        item: bytes of an activation.
        half: activations are float16, which a CPU widens before it multiplies.
        batch: sequences.
        context: tokens of each.
        device: ``cpu`` or ``cuda``.
        packed: linear layers are quantized.
        packed_head: so is the head.
        grows: the cache grows by concatenation.
    """

    dims: Dims
    first: bool
    item: int
    half: bool
    batch: int
    context: int
    device: Literal["cuda", "cpu"]
    packed: bool
    packed_head: bool
    grows: bool


def prefill_bytes(shape: Shape, chunk: int) -> tuple[int, int]:
    """Activations and workspace of a prompt of which `chunk` tokens are computed at once."""
    d, tokens = shape.dims, shape.batch * chunk
    h, f, q = d.hidden, d.ffn, d.heads * d.head_dim
    mask = shape.batch * chunk * shape.context if shape.first or chunk < shape.context else 0  # bool
    # ids, mask and positions as int64, cosines and sines
    kept = mask + tokens * (3 * 8 + (2 if shape.first else 1) * d.head_dim * shape.item)

    def phase(width: int, *layer: int, more: int = 0) -> tuple[int, int]:
        """`width` activations of a token, `more` bytes, inside of a linear layer [out, in] if one is given."""
        workspace = _linear_workspace(shape, tokens, *layer) if layer and shape.packed else 0
        return kept + more + tokens * width * shape.item, workspace

    # 4h: the embeddings, the layer's input, the second residual, the normed input of the MLP.
    if shape.first:
        mlp = [
            phase(4 * h + f, f, h),  # the first linear layer
            phase(4 * h + 2 * f),  # GELU
            phase(4 * h + f + h, h, f),  # the second
        ]
        # Embeddings, input, normed; query_key_value; both rotated, and three temporaries of the second rotation.
        attention = [phase(3 * h + 3 * h, 3 * h, h), phase(3 * h + 3 * h + 4 * h), phase(9 * h, h, h)]
        scores = phase(3 * h + 3 * h + 2 * h + h, more=mask * shape.item)  # the mask as numbers
    else:
        mlp = [
            phase(4 * h + 2 * f, 2 * f, h),
            phase(4 * h + 2 * f + 2 * f),  # gate and up, silu(gate), their product
            phase(4 * h + 2 * f + f + h, h, f),  # gate still holds both halves
        ]
        # Keys and values of this layer count as cache before they are in it. o_proj: the query is there until the end.
        attention = [phase(3 * h + q, q, h), phase(3 * h + 2 * q + h, h, q)]
        # With a mask, keys and values are repeated for every query head.
        repeated = 2 * q * shape.batch * shape.context * shape.item if mask and d.kv_heads < d.heads else 0
        # embeddings, input, normed; query, mixed values, and these once more in the order of the output
        scores = phase(3 * h + 3 * q, more=repeated + mask * shape.item)
    return max(*mlp, *attention, scores, _head(shape, 2 * h * tokens * shape.item + kept), key=sum)


def decode_bytes(shape: Shape) -> tuple[int, int]:
    """Activations and workspace of one more token on a full cache."""
    d = shape.dims
    # Keys, then values, of a layer are copied to a place that is one token larger.
    copied = d.kv_heads * d.head_dim * shape.context * shape.batch * shape.item if shape.grows else 0
    return max((copied, 0), _head(shape, 0), key=sum)


def _head(shape: Shape, live: int) -> tuple[int, int]:
    """The logits of the last token, and sampling's copies of them."""
    rows, vocab = shape.batch, shape.dims.vocab
    workspace = _linear_workspace(shape, rows, vocab, shape.dims.hidden) if shape.packed_head else 0
    return live + rows * vocab * (shape.item + _LOGITS_COPIES), workspace


def _linear_workspace(shape: Shape, tokens: int, rows: int, columns: int) -> int:
    """Beyond input and output of a packed layer [rows, columns]: unpacked tiles, and the product with one."""
    high = min(rows, max(1, _TILE[shape.device] // columns))
    tile = high * columns
    previous = tile * shape.item if high < rows else 0  # until the next one is there
    if shape.device == "cuda":
        unpacking = tile * (1 + shape.item)  # codes of one byte beside the result
        return max(previous + unpacking, tile * shape.item + tokens * high * shape.item)
    if shape.half and tokens > 1:
        widened = 4 * tokens * columns
        return widened + max(previous + tile * 2, tile * (2 + 4) + tokens * high * 4)
    return max(previous + tile * shape.item, (tile + tokens * high) * shape.item)
