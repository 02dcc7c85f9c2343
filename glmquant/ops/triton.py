"""Products with packed weights on NVIDIA GPUs by Triton (`glmquant.ops.triton_kernels`), which comes with torch there.

Triton compiles a kernel when it is first needed, for which it needs a C compiler and a folder that it may write
(``TRITON_CACHE_DIR``, by default in the home). Whether all that works is tried out once for a GPU; `why_not` says what
does not. ``GLMQUANT_TRITON=0`` turns it off.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .interleaved import CHUNK, interleave
from .weight import Layout, Weight

if TYPE_CHECKING:
    from .choice import Request

MOST_ROWS = 16
"""Of activations; above, unpacking a tile of the weight and multiplying it by cuBLAS is faster."""

_OLDEST = (8, 0)  # copies from memory to shared memory that do not wait, and bfloat16
_DTYPES = (torch.float16, torch.bfloat16)
_SPARE = 4 << 10  # of shared memory, for what is exchanged in a step
_lock = threading.Lock()
_found: dict[int, str | None] = {}


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device, as the end of a sentence; None where they can."""
    if device.type != "cuda":
        return f"the weights are on {device.type}"
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if index not in _found:
            _found[index] = _try_out(index)
        return _found[index]


def _try_out(index: int) -> str | None:
    if os.environ.get("GLMQUANT_TRITON") == "0":
        return "GLMQUANT_TRITON=0 turns Triton off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return (
            f"the GPU {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and "
            f"the kernels need {_OLDEST[0]}.{_OLDEST[1]}"
        )
    try:
        _probe(torch.device("cuda", index))
    except (
        Exception
    ) as error:  # of any kind: a missing compiler, a folder without permission, an old driver ...
        return f"Triton cannot compile or run a kernel ({type(error).__name__}: {error})".partition("\n")[0]
    return None


def _probe(device: torch.device) -> None:
    """Multiply once, by weights that are all 1."""
    words = torch.full(
        (32, 8), -0x66666667, dtype=torch.int32, device=device
    )  # 0x99999999: eight times 1 + 8
    scale = torch.ones(32, 1, dtype=torch.float16, device=device)
    x = torch.ones(1, CHUNK, dtype=torch.float16, device=device)
    weight = interleave(Weight(words, scale, None), 4, CHUNK)
    if linear(x, weight.packed, weight.scale, None, None, 4).tolist() != [[float(CHUNK)] * 32]:
        raise RuntimeError("it gave a wrong result")


def layout_objection(device: torch.device, rows: int, groups: int, columns: int) -> str | None:
    """Why a weight [rows, columns] on a device is better not interleaved, as the end of a sentence; None if it is."""
    group = columns // max(1, groups)
    if rows % 2:
        return f"{rows} is an odd number of rows"
    if groups != 1 and group != CHUNK // 2 and group % CHUNK:
        return f"its groups have {group} columns, which is neither {CHUNK // 2} nor a multiple of {CHUNK}"
    return why_not(device)


def objection(request: Request) -> str | None:
    """Why `linear` is not for a request; see `glmquant.ops.choice`."""
    if request.device != "cuda":
        return f"the activations are on {request.device}"
    if request.layout is not Layout.INTERLEAVED:
        return "the weight is not interleaved, which loading onto a GPU does where Triton can be used"
    if request.dtype not in _DTYPES:
        return f"the activations are {str(request.dtype).removeprefix('torch.')}"
    if request.rows > MOST_ROWS:
        return f"there are {request.rows} rows, and above {MOST_ROWS} unpacking a tile once is faster"
    return why_not(torch.device("cuda"))


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`glmquant.ops.linear` for x [rows, in], at most `MOST_ROWS`, half or bfloat16, and an interleaved weight.

    Sums in float32 and does not round weights. The same operands give the same bits each time, and a row the same as
    alone, up to 8 rows.
    """
    from . import triton_kernels

    (m, k), n = x.shape, packed.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    x = x.contiguous()
    options = configuration(m, n, k, scale.shape[0], bits, _shared_memory(x.device))
    scales = _pairs(scale)
    zeros = scales if zero_point is None else _pairs(zero_point)
    with _on(x.device):
        triton_kernels.linear_kernel[(-(-n // options["BLOCK_N"]),)](
            x, packed, scales, zeros, x if bias is None else bias, y, m, n, k, packed.shape[1], scale.stride(0) // 2,
            BITS=bits, SCALES=str(scale.dtype).removeprefix("torch."), ASYMMETRIC=zero_point is not None,
            BIASED=bias is not None, **options,
        )  # fmt: skip
    return y


def configuration(m: int, n: int, k: int, groups: int, bits: int, shared: int) -> dict[str, Any]:
    """How `linear_kernel` is cut into blocks, steps and warps; the reasons are in kernels/NOTES.md.

    Args:
        m: rows of the activations.
        n: rows of the weight.
        k: columns of the weight.
        groups: in a row of the weight.
        bits: of a weight, 4 or 8.
        shared: bytes of shared memory that a block may have.
    """
    group = 0 if groups == 1 else k // groups
    tile = (
        2 if group % (2 * CHUNK) == 0 else 1
    )  # chunks; all of a tile has one scale, or two where a group is 32
    chunks = -(-k // CHUNK)
    slices = 8
    while slices > 1 and slices * tile > chunks:
        slices //= 2
    block_m = 8 if m <= 8 else 16
    block_n = 32 if n <= 16384 or m > 8 else 64
    # A step's operands: weights, activations, scales and zero points. Up to three steps are on their way.
    a_step = slices * tile * (CHUNK * (block_n * bits // 8 + 2 * block_m) + 8 * block_n)
    ahead = max(1, min(3, (shared - _SPARE) // a_step))
    return {
        "GROUP": group, "EVEN_N": n % block_n == 0, "EVEN_K": k % (CHUNK * tile * slices) == 0,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "TILE": tile, "SLICES": slices, "STAGES": ahead + 1,
        "num_warps": max(4, slices),
    }  # fmt: skip


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`glmquant.ops.dequantize` of an interleaved weight."""
    from . import triton_kernels

    n, chunks, _ = packed.shape
    out = torch.empty(n, columns, dtype=dtype, device=packed.device)
    block_n, tile = 16, 4
    group = 0 if scale.shape[0] == 1 else columns // scale.shape[0]
    with _on(out.device):
        triton_kernels.dequantize_kernel[(-(-n // block_n), -(-chunks // tile))](
            packed, scale, scale if zero_point is None else zero_point, out, n, columns, chunks, scale.stride(0),
            BITS=bits, GROUP=group, ASYMMETRIC=zero_point is not None, BLOCK_N=block_n, TILE=tile,
        )  # fmt: skip
    return out


def _pairs(table: Tensor) -> Tensor:
    """16-bit numbers as int32, two of them each; others as they are."""
    if table.element_size() != 2:
        return table
    if table.shape[0] == 1:  # whose stride is anything, and torch wants it even
        table = table.as_strided(table.shape, (table.shape[1], 1))
    return table.view(torch.int32)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)
