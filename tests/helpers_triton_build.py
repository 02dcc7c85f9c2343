"""Compile Triton kernels to machine code, for which no GPU is needed; prints what became of each, as JSON.

A program of its own, because the tests run in Triton's interpreter: ``python tests/helpers_triton_build.py 90``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glmquant.ops import decoding_kernels, triton_kernels
from glmquant.ops.triton import configuration

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
LINEAR: dict[
    str, tuple[Any, ...]
] = {  # rows of x, [out, in], groups in a row, bits, whether there are zero points, dtype
    "int4 half": (1, 4608, 4096, 32, 4, False, "fp16"),
    "int4 bfloat16, wide": (1, 27392, 4096, 32, 4, False, "bf16"),
    "int4 bfloat16, 16 rows, uneven": (16, 4096, 13696, 107, 4, False, "bf16"),
    "int4 half, groups of 32, asymmetric": (8, 4608, 4096, 128, 4, True, "fp16"),
    "int8 bfloat16, rows": (4, 4096, 13696, 1, 8, False, "bf16"),
    "int8 half, 16 rows, asymmetric": (16, 4608, 4096, 32, 8, True, "fp16"),
}
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a block may have."""


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> Any:
    """The kernel with `types` of its arguments; all pointers and sizes are multiples of 16."""
    warps = constants.pop("num_warps", 4)
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name][0] in "*i"}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    return triton.compile(source, GPUTarget("cuda", arch, 32), {"num_warps": warps})


def linear(arch: int, m: int, n: int, k: int, groups: int, bits: int, asymmetric: bool, dtype: str) -> Any:
    """`linear_kernel` as it is launched."""
    scales = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    types = dict.fromkeys(("x", "bias", "y"), f"*{dtype}") | dict.fromkeys(
        ("packed", "scale", "zero"), "*i32"
    )
    options = configuration(m, n, k, groups, bits, SHARED[arch])
    options |= {"BITS": bits, "SCALES": scales, "ASYMMETRIC": asymmetric, "BIASED": True}
    return compiled(triton_kernels.linear_kernel, types, options, arch)


def others(arch: int) -> dict[str, Any]:
    """The kernels between the products, with the sizes of ChatGLM3-6B."""
    k, half = decoding_kernels, "*bf16"
    sizes = {"PER_GROUP": 16, "WIDTH": 128, "PARTS": 64}
    parts = dict.fromkeys(("sums", "maxima", "totals"), "*fp32")
    caches = dict.fromkeys(("query", "keys", "values", "qkv", "cos", "sin"), half) | {
        "column": "*i64",
        "first": "*i64",
    }
    return {
        "norm": compiled(
            k.norm_kernel, {"x": half, "delta": half, "weight": half, "out": half, "EPSILON": "fp32"},
            {"COLUMNS": 4096, "ADD": True, "BLOCK": 4096, "num_warps": 8}, arch,
        ),
        "silu": compiled(k.silu_kernel, {"both": half, "out": half}, {"BLOCK": 1024}, arch),
        "rotate": compiled(k.rotate_kernel, caches, {"PAIRS": 64, "num_warps": 1}, arch),
        "attention": compiled(
            k.attention_kernel, caches | parts | {"SCALE": "fp32"}, {**sizes, "BLOCK_H": 16, "BLOCK": 64}, arch
        ),
        "merge": compiled(k.merge_kernel, parts | {"out": half}, dict(sizes), arch),
        "dequantize": compiled(
            triton_kernels.dequantize_kernel, {"packed": "*i32", "scale": half, "zero": "*i16", "out": half},
            {"BITS": 4, "GROUP": 128, "ASYMMETRIC": False, "BLOCK_N": 16, "TILE": 4}, arch,
        ),
    }  # fmt: skip


def report(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory; and of the loop over the columns, what waits for memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", file)
        code = _cuobjdump("-sass", file)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loop = kernel.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "waits": loop.count("tt.load "),
        "ahead": loop.count("async_copy_global_to_local"),
        "conversions": len(re.findall(r"\b(?:I2F|F2F)", code)),
    }


def _cuobjdump(option: str, file: Path) -> str:
    command = [str(_BIN / "cuobjdump"), option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """See the module."""
    arch = int(sys.argv[1])
    kernels = {name: linear(arch, *sizes) for name, sizes in LINEAR.items()} | others(arch)
    print(
        json.dumps(
            {name: report(kernel) | {"shared_limit": SHARED[arch]} for name, kernel in kernels.items()}
        )
    )


if __name__ == "__main__":
    main()
