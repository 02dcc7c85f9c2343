"""Products with packed weights on NVIDIA GPUs by the package ``humming-kernels``, where one asks for it.

``GLMQUANT_HUMMING=1``, when a model is loaded, gives weights the layout of that package, which then computes all their
products; `why_not` says what is in the way. **Off by default, as it has never run on a GPU here.** Two more reasons:
its kernels add up parts of a sum in the order in which they are done, in 16 bit, so that the same product may differ
in its last bits from one time to the next; and it compiles a kernel for each shape and number of rows, with NVRTC or
nvcc. Each GPU first multiplies a small weight of the kind at hand (`_probe`), and a wrong result turns it off.

Layout, for 16-bit activations: a block of 64 rows and 16 columns is 32 x b words for b-bit codes. Thread t of a warp,
which has the rows t/4 + 0, 8, 16, ... and the columns 2*(t%4) + 0, 1, 8, 9 of it, finds there in word w

    4 bits: rows 16w + 0, 8    bits  0..15  column 2*(t%4) + (0, 8) of the one row, then of the other
                               bits 16..31  the columns after these
    8 bits: row 8w             bits  0..31  columns 2*(t%4) + 0, 8, 1, 9
    stored: code + 2**(b-1); 8 bits with bfloat16 scales: code, if negative with the lower bits inverted

    weight_packed      int32 [in/16, out/64, 32, b]; four dimensions tell it from the other layouts
    weight_scale       half or bfloat16 [groups, out]; in 64 of them (without groups: 32) neighbours are 8 apart
    weight_zero_point  int32 [groups, out/8]: zero point + 8 of 4 bits, in the order of scales with groups; or None
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..packing import pack_int32, unpack_int32
from .weight import Layout, Weight, height

if TYPE_CHECKING:
    from .choice import Request

_OLDEST = (7, 5)
_DTYPES = (torch.float16, torch.bfloat16)
_ROWS = (8, 16, 64, 256, 4096)
"""Of activations, which share a kernel up to each of these; the last is for more, too."""
_LOCKS = 2048  # the package's own number
_BLOCK = 1 << 24  # weights that are rearranged at a time


def layout_objection(weight: Weight, bits: int, columns: int) -> str | None:
    """Why a weight, in whichever layout, is better not given this one, as the end of a sentence; None if it is."""
    if not _wanted():
        return _UNWANTED
    rows = height(weight.packed)
    if rows % 128 or columns % 64:
        return f"{rows} rows and {columns} columns are no multiples of 128 and 64"
    group = columns // weight.groups
    if weight.groups != 1 and (group < 32 or group & (group - 1)):
        return f"its groups have {group} columns, which is no power of two from 32 on"
    if weight.scale.dtype not in _DTYPES:
        return f"its scales are {_name(weight.scale.dtype)}"
    if bits == 8 and weight.zero_point is not None:
        return "it has 8 bits and zero points"
    return why_not(weight.packed.device, bits, weight.zero_point is None, weight.scale.dtype)


def why_not(device: torch.device, bits: int, symmetric: bool, dtype: torch.dtype) -> str | None:
    """Why the package cannot be used on a device for a kind of weights, as the end of a sentence; None where it can."""
    if device.type != "cuda":
        return f"the weights are on {device.type}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _try_out(index, bits, symmetric, dtype)


_UNWANTED = "GLMQUANT_HUMMING=1 does not ask for it"


def _wanted() -> bool:
    return os.environ.get("GLMQUANT_HUMMING") == "1"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _try_out(index: int, bits: int, symmetric: bool, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("humming") is None:
        return "humming-kernels is not installed (pip install humming-kernels)"
    capability = torch.cuda.get_device_capability(index)
    oldest = (8, 0) if dtype == torch.bfloat16 else _OLDEST
    if capability < oldest:
        name, (major, minor) = torch.cuda.get_device_name(index), capability
        return (
            f"the GPU {name} has compute capability {major}.{minor}, and {_name(dtype)} needs "
            f"{oldest[0]}.{oldest[1]}"
        )
    try:
        _probe(torch.device("cuda", index), bits, symmetric, dtype)
    except (
        Exception
    ) as error:  # of any kind: another version, a missing compiler, a folder without permission ...
        return f"humming-kernels cannot compile or run a kernel ({type(error).__name__}: {error})".partition(
            "\n"
        )[0]
    return None


def _probe(device: torch.device, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Multiply a weight whose codes, scales and zero points are all over the place."""
    rows, columns, groups = 256, 512, 4
    chosen = torch.Generator().manual_seed(0)

    def some(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=chosen).to(device)

    codes = some(-(1 << bits - 1), 1 << bits - 1, rows, columns).to(torch.int8)
    scale = (some(64, 128, rows, groups) / 4096).to(dtype)
    zero_point = None if symmetric else some(-8, 8, rows, groups).to(torch.int8)
    x = (some(-8, 8, 3, columns) / 8).to(dtype)
    weight = arrange(Weight(pack_int32(codes, bits), scale, zero_point), bits, columns)
    found = linear(x, weight.packed, weight.scale, weight.zero_point, None, bits).double()
    shifted = codes.view(rows, groups, -1) - (0 if zero_point is None else zero_point[..., None].double())
    exact = x.double() @ (shifted * scale[..., None].double()).view(rows, columns).t()
    if float((found - exact).abs().max() / exact.abs().max()) > 0.02:
        raise RuntimeError("it gave a wrong result")


def objection(request: Request) -> str | None:
    """Why `linear` is not for a request; see `glmquant.ops.choice`."""
    if request.layout is not Layout.HUMMING:
        return "the weight was loaded before it was asked for" if _wanted() else _UNWANTED
    if request.device != "cuda":
        return f"the activations are on {request.device}"
    if request.dtype != request.scale_dtype:
        return f"the activations are {_name(request.dtype)}, and the scales {_name(request.scale_dtype)}"
    return None


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`glmquant.ops.linear` for x [rows, in] of the dtype of the scales, and a weight from `arrange`."""
    from humming.ops import humming_gemm

    (m, k), n = x.shape, height(packed)
    if m == 0:
        return x.new_empty(0, n)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    layer, kernel = prepared(x.device, x.dtype, n, k, scale.shape[0], bits, zero_point is None, step(m))
    y: Tensor = humming_gemm(
        layer_config=layer, tuning_config=kernel, inputs=x, weight=packed.flatten(1), weight_scale=scale,
        zero_point=zero_point, locks=_locks(x.device, packed.data_ptr()),
    )  # fmt: skip
    return y if bias is None else y.add_(bias)


def step(m: int) -> int:
    """The number of rows that the kernel for `m` rows is made for."""
    return next((rows for rows in _ROWS if m <= rows), _ROWS[-1])


@cache
def prepared(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    k: int,
    groups: int,
    bits: int,
    symmetric: bool,
    rows: int,
) -> tuple[str, str]:
    """What the package wants to know of a weight, and of the kernel for `step` rows, compiled when first used."""
    from humming.dtypes import DataType
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    schema = HummingWeightSchema(
        b_dtype=DataType.from_str(f"uint{bits}"), bs_dtype=DataType.from_torch_dtype(dtype),
        weight_scale_group_size=0 if groups == 1 else k // groups, has_zero_point=not symmetric,
    )  # fmt: skip
    layer = prepare_layer_config(shape_n=n, shape_k=k, weight_schema=schema, torch_dtype=dtype, device=device)
    return layer.to_str(), json.dumps(get_heuristics_config(layer, shape_m=rows, device=device))


@cache
@torch.inference_mode(False)
def _locks(device: torch.device, address: int) -> Tensor:
    """What blocks that share a sum wait by: zeros before and after. Two products at the same time must not share it."""
    return torch.zeros(_LOCKS, dtype=torch.int32, device=device)


def arrange(weight: Weight, bits: int, columns: int) -> Weight:
    """From the layout of `glmquant.ops.linear` to this one; `layout_objection` has nothing against it."""
    rows = weight.packed.shape[0]
    packed = weight.packed.new_empty(columns // 16, rows // 64, 32, bits)
    order, step = _order(bits, packed.device), 64 * max(1, _BLOCK // 64 // columns)
    for start in range(0, rows, step):
        codes = unpack_int32(weight.packed[start : start + step], bits, columns)
        blocks = codes.view(-1, 64, columns // 16, 16).permute(2, 0, 1, 3).flatten(2)[..., order]
        if _folded(bits, weight.scale):
            blocks = torch.where(blocks < 0, ~blocks, blocks ^ -128)
        packed[:, start // 64 : (start + step) // 64] = pack_int32(blocks.flatten(0, 1), bits).view(
            columns // 16, -1, 32, bits
        )
    zero_point = weight.zero_point
    if zero_point is not None:
        table = _transposed_blocks((zero_point + 8).t().contiguous(), grouped=True).view(torch.uint8)
        zero_point = (table[:, ::2] | table[:, 1::2] << 4).view(torch.int32)
    return Weight(packed, _transposed_blocks(weight.scale.t().contiguous(), weight.groups > 1), zero_point)


def restore(weight: Weight, bits: int, columns: int) -> Weight:
    """The inverse of `arrange`."""
    rows, groups = height(weight.packed), weight.groups
    packed = weight.packed.new_empty(rows, columns * bits // 32)
    order, step = _order(bits, packed.device).argsort(), 64 * max(1, _BLOCK // 64 // columns)
    for start in range(0, rows, step):
        block = weight.packed[:, start // 64 : (start + step) // 64]
        codes = unpack_int32(block.reshape(-1, 32 * bits), bits, 1024)[:, order]
        if _folded(bits, weight.scale):
            codes = torch.where(codes < 0, codes ^ -128, ~codes)
        codes = codes.view(columns // 16, -1, 64, 16).permute(1, 2, 0, 3).reshape(-1, columns)
        packed[start : start + step] = pack_int32(codes, bits)
    zero_point = weight.zero_point
    if zero_point is not None:
        pairs = zero_point.view(torch.uint8)
        table = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(groups, rows).view(torch.int8)
        zero_point = (_transposed_blocks(table, grouped=True) - 8).t().contiguous()
    return Weight(packed, _transposed_blocks(weight.scale, groups > 1).t().contiguous(), zero_point)


def _order(bits: int, device: torch.device) -> Tensor:
    """Which code of a block of 64 rows and 16 columns is the first of its words, which the second ...: [1024]."""
    # row: 16s, 8s, 1s; column: 8s, 2s, 1s -> thread (row 1s, column 2s); word; in it
    axes = (2, 4, 0, 5, 1, 3) if bits == 4 else (2, 4, 0, 1, 5, 3)
    return torch.arange(1024, device=device).view(4, 2, 8, 2, 4, 2).permute(axes).flatten()


def _folded(bits: int, scale: Tensor) -> bool:
    """Whether codes are stored as a sign and a size, as eight bits do not fit into a bfloat16's fraction."""
    return bits == 8 and scale.dtype == torch.bfloat16


def _transposed_blocks(table: Tensor, grouped: bool) -> Tensor:
    """[groups, out] -> the same in the order of the kernels' registers. It is its own inverse."""
    blocks = table.view(len(table), -1, 8, 8, 1) if grouped else table.view(len(table), -1, 4, 4, 2)
    return blocks.transpose(2, 3).reshape(table.shape)
