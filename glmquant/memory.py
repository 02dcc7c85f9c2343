"""How much memory a checkpoint takes when it runs, term by term, from its config and headers alone.

`Model` is what matters of a checkpoint (or of a plan for one), `Workload` what is asked of it, and `estimate` gives
the terms. Two totals matter: `Memory.allocated` is what torch's allocator would report at its peak, `Memory.process`
adds what the process itself takes, and is what has to fit.

Weights and caches are arithmetic and exact. The activations are those tensors that are alive at the widest point of
a forward pass (`glmquant.memory_activations`). The fixed sizes of a process are measured figures, and say where.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from . import _native
from .checkpoint.source import ITEM_SIZES
from .errors import UsageError
from .families import Role
from .memory_activations import Product, Shape, Taken, decode_bytes, prefill_bytes
from .memory_cache import cache_bytes, capacities
from .memory_model import Held, Model, Place, bitsandbytes_bytes, held_bytes, interleaved

__all__ = [
    "RUNTIMES", "Held", "Memory", "Model", "Workload", "check_context", "estimate", "held_bytes", "longest_context",
]  # fmt: skip

Cache = Literal["dynamic", "static"]
Runtime = Literal["glmquant", "transformers", "vllm", "llama.cpp"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)

_MIB = 1 << 20
# Resident memory of a Python process on a CPU that has run a model, less the model: interpreter, torch, transformers
# and their pages. Measured with torch 2.13 (CPU build), transformers 5.23, Python 3.11 on Linux.
_CPU_PROCESS = 362 * _MIB
# torch imports Triton where it is installed, as it is beside its CUDA builds; measured with Triton 3.
_TRITON = 79 * _MIB
# Of the cache and the activations: what glibc's malloc holds beyond what is in use. Measured, 0.27 to 0.55 (the most
# with long prompts in half, whose attention is computed in float32); it differs from run to run.
_CPU_SLACK = 0.40
# A CUDA context with torch's and cuBLAS' modules and workspaces, and what the caching allocator reserves beyond what
# is in use, of the cache and the activations. Typical figures; not measured by this project yet.
_CUDA_PROCESS = 512 * _MIB
_CUDA_SLACK = 0.10
# Row blocks of a weight that is being loaded: codes, their temporaries and a block in 16 bit; see models/loading.py.
_LOAD_BLOCKS = 8 * _MIB
_ORDERED = 1 << 24  # weights that are put in order at a time, in glmquant/ops/interleaved.py
_TRITON_ROWS = 16  # of activations, up to which a GPU unpacks nothing: glmquant/ops/triton.py
_STEPPED = ("chatglm2", "glm")  # families that `glmquant.models.step` is for
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_VLLM_BLOCK, _VLLM_TOKENS, _VLLM_SEQUENCES = 16, 8192, 256  # vLLM's defaults: cache block, chunk, sequences
_LLAMA_TOKENS = 512  # llama.cpp's n_ubatch


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do.

    Args:
        context: tokens of prompt and answer together, of each sequence.
        batch: sequences at a time, all of the same length: padding would add a mask.
        cache: ``dynamic`` is what `generate` makes: it grows by concatenation, or in our own loop to twice its
            size (`glmquant.memory_cache`). ``static`` has its full size at once.
        chunk: tokens of the prompt that are computed at once; None is all of them.
        prompt: tokens of the context that the prompt has; None is all of them, which takes the most.

    Raises:
        UsageError: a number that is not positive, or a prompt longer than the context.
    """

    context: int
    batch: int = 1
    cache: Cache = "dynamic"
    chunk: int | None = None
    prompt: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch", "chunk", "prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} makes no sense; use 1 or more.")
        if self.prompt is not None and self.prompt > self.context:
            raise UsageError(
                f"a prompt of {self.prompt} tokens is longer than the context of {self.context}."
            )


@dataclass(frozen=True)
class Memory:
    """Bytes by term.

    Attributes:
        weights: packed codes of quantized weights.
        scales: their scales and zero points.
        rest: what is not quantized: embeddings, head, norms, biases.
        cache: keys and values of all tokens, and the room that is left.
        activations: what a forward pass holds at its widest point, the growing of a dynamic cache included.
        workspace: unpacked weights of the linear layer at that point.
        scratch: what a compiled CPU kernel takes beside; torch's allocator does not see it.
        process_base: the process without a model: a CUDA context, or interpreter and libraries on a CPU.
        slack: what allocators hold beyond what is in use.
        load_peak: most of `process` while loading.
        approximate: the figures are rules of thumb about a program that is not ours.
        note: what to know about the runtime; empty if nothing.
    """

    weights: int
    scales: int
    rest: int
    cache: int
    activations: int
    workspace: int
    process_base: int
    slack: int
    load_peak: int
    scratch: int = 0
    approximate: bool = False
    note: str = ""

    @property
    def resident(self) -> int:
        """The model itself."""
        return self.weights + self.scales + self.rest

    @property
    def allocated(self) -> int:
        """Peak of what torch's allocator gives out."""
        return self.resident + self.cache + self.activations + self.workspace

    @property
    def process(self) -> int:
        """Peak of the whole process while it runs."""
        return self.allocated + self.scratch + self.process_base + self.slack

    @property
    def peak(self) -> int:
        """What has to fit: running or loading, whichever takes more."""
        return max(self.process, self.load_peak)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {"allocated": self.allocated, "process": self.process, "peak": self.peak}
        return {**asdict(self), **totals}


def estimate(
    model: Model,
    workload: Workload,
    runtime: str = "glmquant",
    device: Place = "cuda",
    tp: int = 1,
) -> Memory:
    """The memory of `model` under `workload`.

    Args:
        model: see `Model`.
        workload: see `Workload`.
        runtime: ``glmquant`` (`glmquant.load`), ``transformers`` without it, or roughly, ``vllm`` and ``llama.cpp``.
        device: the one the model runs on.
        tp: GPUs that share it (vLLM); figures are for one of them.

    Raises:
        UsageError: no such runtime, or one that cannot be split.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime {runtime!r} is not known; use {', '.join(RUNTIMES)}.")
    if tp < 1 or (tp > 1 and runtime != "vllm"):
        raise UsageError(f"--tp {tp} needs --runtime vllm; the other runtimes use one GPU.")
    if runtime == "vllm":
        return _vllm(model, workload, tp)
    if runtime == "llama.cpp":
        return _llama(model, workload)
    note = ""
    if runtime == "transformers" and any(held.scheme for held in model.held):
        if _by_bitsandbytes(model):
            note = "bitsandbytes keeps weights packed, and unpacks those of one layer at a time"
        else:
            model = model.unpacked()
            note = "plain transformers unpacks quantized weights to 16 bit before it runs, so they save no memory there"
    weights, scales, rest = _resident(model, runtime, device)
    cache, regrown, later = _cache(model, workload, runtime, device)
    activations, workspace, scratch = _activations(model, workload, runtime, device, regrown, later)
    base, slack = (_cpu_process(), _CPU_SLACK) if device == "cpu" else (_CUDA_PROCESS, _CUDA_SLACK)
    # On a CPU the pages of the layer that is being copied are resident too; on a GPU, a weight is put in order.
    beside = _largest_stage(model) if device == "cpu" else _ordering(model)
    return Memory(
        weights, scales, rest, cache, activations, workspace,
        process_base=base,
        slack=int(slack * (cache + activations + workspace)),
        load_peak=base + weights + scales + rest + beside + _LOAD_BLOCKS,
        scratch=scratch,
        note=note,
    )  # fmt: skip


def longest_context(
    model: Model,
    workload: Workload,
    budget: int,
    runtime: str = "glmquant",
    device: Place = "cuda",
    tp: int = 1,
) -> int:
    """The longest context, up to the model's own, whose peak is at most `budget` bytes; 0 if there is none.

    Memory grows with the context, so halving the interval finds it.
    """

    def fits(context: int) -> bool:
        return estimate(model, replace(workload, context=context), runtime, device, tp).peak <= budget

    low, high = 0, model.dims.context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def check_context(model: Model, context: int) -> None:
    """Refuse a context that the model was not made for.

    Raises:
        UsageError: it is longer than config.json allows.
    """
    if context > model.dims.context:
        raise UsageError(
            f"--context {context} is beyond the {model.dims.context} tokens this model was made for; "
            "use a smaller one."
        )


def _cpu_process() -> int:
    return _CPU_PROCESS + (_TRITON if importlib.util.find_spec("triton") else 0)


def _by_bitsandbytes(model: Model) -> bool:
    return any(held.scheme and held.scheme.book != "int" for held in model.held)


def _resident(model: Model, runtime: str = "glmquant", device: Place = "cpu") -> tuple[int, int, int]:
    if runtime == "transformers":
        each = [bitsandbytes_bytes(held, model.dtype) for held in model.held]
    else:
        each = [held_bytes(held, model.dtype, device) for held in model.held]
    weights, scales, rest = zip(*each, strict=True)
    return sum(weights), sum(scales), sum(rest)


def _cache(model: Model, workload: Workload, runtime: str, device: Place) -> tuple[int, int, int]:
    """Bytes of the cache at the end; beside it when it last grew; and of it what is not there yet with the prompt."""

    def size(columns: int) -> int:
        return cache_bytes(model.dims, workload.batch * columns, model.dtype)

    prompt, context = workload.prompt or workload.context, workload.context
    if workload.cache == "static":
        return size(context), 0, 0
    if not _stepped(model, runtime, device):
        return size(context), 0, size(context - prompt)
    columns = capacities(prompt, context)
    # Keys are copied to a larger place and let go of, then values.
    regrown = size(columns[-2]) // 2 if len(columns) > 1 else 0
    return size(columns[-1]), regrown, size(columns[-1] - columns[0])


def _activations(
    model: Model, workload: Workload, runtime: str, device: Place, regrown: int, later: int
) -> Taken:
    prompt = workload.prompt or workload.context
    chunk = min(workload.chunk or prompt, prompt)
    linear = _product(model, Role.LINEAR, runtime, device, workload.batch * chunk)
    first = model.family == "chatglm"
    shape = Shape(
        model.dims,
        first=first,
        item=ITEM_SIZES[model.dtype],
        half=model.dtype == "F16",
        batch=workload.batch,
        context=workload.context,
        device=device,
        linear=linear,
        head=_product(model, Role.HEAD, runtime, device, workload.batch),
        short=os.environ.get("GLMQUANT_EXACT") != "1",
        joint=(runtime, device) == ("glmquant", "cpu") and not first and linear != "level tiles",
        grows=workload.cache == "dynamic" and not _stepped(model, runtime, device),
    )
    prefill = prefill_bytes(replace(shape, context=prompt), chunk)
    prefill = prefill._replace(activations=prefill.activations - later)
    return Taken.widest((prefill, decode_bytes(shape), Taken(regrown, 0, 0)))


def _stepped(model: Model, runtime: str, device: Place) -> bool:
    """Whether `generate` goes by `glmquant.models.step`, whose cache has room for what is to come."""
    possible = device == "cuda" or _native.expected()
    return possible and runtime == "glmquant" and model.family in _STEPPED


def _product(model: Model, role: Role, runtime: str, device: Place, tokens: int) -> Product:
    """What `glmquant.ops.choice` will choose; of layers that differ, the one that takes most."""
    if role is Role.HEAD and model.dims.tied_head:
        role = Role.EMBEDDING
    held = [held for held in model.held if held.role is role and held.scheme]
    schemes = [(each.scheme, each.shape[1]) for each in held if each.scheme]
    if not held:
        return "dense"
    if runtime == "transformers":
        return "whole" if schemes[0][0].book == "nf4" else "whole int8"
    if any(scheme.levels is not None for scheme, _ in schemes):
        return "level tiles"
    if device == "cuda":
        if not all(interleaved(each, device) for each in held):
            return "coded tiles"
        return "dense" if tokens <= _TRITON_ROWS and model.dtype != "F32" else "tiles"
    if not _native.expected():  # torch unpacks in the scales' dtype if that is the activations'
        others = any(scheme.scale_dtype != _TORCH_NAMES[model.dtype] for scheme, _ in schemes)
        return "wide tiles" if others and model.dtype != "F32" else "tiles"
    amx = model.dtype == "BF16" and tokens > _native.AMX_ROWS and _native.has_amx()
    widths = [(columns // scheme.groups(columns), scheme.groups(columns)) for scheme, columns in schemes]
    in_blocks = all(width % 32 == 0 or groups == 1 for width, groups in widths)
    return "kernel" if in_blocks and not amx else "tiles"


def _ordering(model: Model) -> int:
    """What it takes to put the largest weight in the order of a GPU's kernels: `glmquant.ops.interleave`."""
    found = [held for held in model.held if interleaved(held, "cuda")]
    largest = max((math.prod(held.shape) for held in found), default=0)
    packed = max((sum(held_bytes(held, model.dtype, "cuda")) for held in found), default=0)
    return packed + 3 * min(largest, _ORDERED)


def _largest_stage(model: Model) -> int:
    """Bytes of the file that are mapped at a time while loading: those of an embedding, or of a layer."""
    ends = [
        sum(held_bytes(h, model.dtype, "cpu")) for h in model.held if h.role in (Role.EMBEDDING, Role.HEAD)
    ]
    layers = sum(_resident(model)) - sum(ends)
    return max(*ends, layers // model.dims.layers)


def _vllm(model: Model, workload: Workload, tp: int) -> Memory:
    """vLLM, roughly: cache in blocks of 16 tokens, activations of a chunk of at most 8192 tokens, CUDA graphs.

    It then reserves what is left below its ``gpu_memory_utilization`` for more cache.
    """
    dims = model.dims
    weights, scales, rest = (n // tp for n in _resident(model))
    tokens = -(-workload.context // _VLLM_BLOCK) * _VLLM_BLOCK
    cache = cache_bytes(dims, workload.batch * tokens, model.dtype) // min(tp, dims.kv_heads)
    item = ITEM_SIZES[model.dtype]
    chunk = min(_VLLM_TOKENS, workload.context * workload.batch)
    logits = _VLLM_SEQUENCES * dims.vocab * (item + 4) // tp
    activations = max(chunk * item * (3 * dims.hidden + 3 * dims.ffn // tp), logits)
    base = _CUDA_PROCESS + 512 * _MIB  # and captured CUDA graphs
    return Memory(
        weights, scales, rest, cache, activations, 0, base, 0,
        load_peak=base + weights + scales + rest + _largest_stage(model),
        approximate=True, note="vLLM also reserves what is left of its --gpu-memory-utilization for more cache",
    )  # fmt: skip


def _llama(model: Model, workload: Workload) -> Memory:
    """llama.cpp, roughly: the file, a half cache, and the buffers of a batch of 512 tokens (logits in float32)."""
    dims = model.dims
    weights, scales, rest = _resident(model)
    if model.file_bytes < weights + scales + rest:  # K-quants, which only llama.cpp keeps as they are
        weights, scales, rest = model.file_bytes, 0, 0
    tokens = min(_LLAMA_TOKENS, workload.context)
    cache = cache_bytes(dims, workload.batch * -(-workload.context // 256) * 256, "F16")
    activations = 4 * tokens * max(dims.vocab, 4 * dims.hidden + 3 * dims.ffn)
    base = 300 * _MIB
    return Memory(
        weights, scales, rest, cache, activations, 0, base, 0,
        load_peak=base + weights + scales + rest, approximate=True,
        note="llama.cpp needs a GGUF file, which --format gguf writes",
    )  # fmt: skip
