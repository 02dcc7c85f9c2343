"""``glmquant inspect``: what a checkpoint is, from its headers."""

from __future__ import annotations

import json

import click

from ..recipe import show_size
from .hub import tell_which
from .terminal import endpoint_option, json_option, print_rows


@click.command()
@click.argument("ref")
@endpoint_option
@json_option
def inspect(ref: str, as_json: bool) -> None:
    """Describe the checkpoint REF: sizes, quantization, memory.

    \b
    glmquant inspect chatglm3-6b
    glmquant inspect chatglm3-6b-int4 --json
    glmquant inspect hf:THUDM/chatglm3-6b

    Reads config.json and headers only, also of a model on a hub.
    """  # noqa: D301 - see main
    from .._inspect import inspect as run

    tell_which(ref)
    found = run(ref)
    if as_json:
        return click.echo(json.dumps(found.to_json(), indent=2))
    d = found.dims
    rows = [
        ("model", f"{found.model} ({found.family}, {found.layout} layout)"),
        (
            "weights",
            f"{found.parameters / 1e9:.2f} billion, {show_size(found.nbytes)} in {len(found.files)} files",
        ),
        ("stored as", ", ".join(f"{t} {show_size(n)}" for t, n in found.dtypes.items())),
        ("quantization", ", ".join(f"{s} ({n} weights)" for s, n in found.schemes.items()) or "none"),
        (
            "layers",
            f"{d.layers} x {d.hidden}, {d.heads} heads ({d.kv_heads} KV) of {d.head_dim}, MLP {d.ffn}",
        ),
        ("vocabulary", f"{d.vocab}"),
        ("memory", f"weights {show_size(found.nbytes)}, and a 16-bit KV cache for one sequence of"),
    ]
    contexts = sorted({n for n in (2048, 8192, d.context) if n <= d.context})
    rows += [("", f"  {n:>6} tokens  {show_size(found.cache_bytes(n))}") for n in contexts]
    print_rows(rows)
    return None
