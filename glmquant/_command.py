"""The options that make the same bytes again, for a model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .recipe import Recipe


def options(report: Mapping[str, Any]) -> str:
    """Of ``glmquant convert``, as its report states them."""
    recipe = report["recipe"]
    fit = recipe.get("fit")
    if recipe.get("k_quant"):
        return " ".join(
            ["--gguf-type", recipe["k_quant"], *(["--adapter LORA"] if report["source"]["adapter"] else [])]
        )
    if fit:
        chosen = [f"--fit {fit['budget']} --context {fit['context']} --batch {fit['batch']}"]
    else:
        chosen = [
            f"--bits w8a{recipe['activations']}" if recipe.get("activations") else f"--bits {recipe['bits']}"
        ]
        chosen += [f"--group-size {recipe['group_size']}"] if recipe["group_size"] is not None else []
        chosen += [] if recipe["symmetric"] else ["--asymmetric"]
    # That of bitsandbytes goes without saying: the command line has no name for it.
    chosen += [f"--method {recipe['method']}"] if recipe["method"] not in (None, "bitsandbytes") else []
    # A budget in which everything fits in 16 bit leaves the format that was asked for.
    chosen += [] if fit and recipe["bits"] == 16 else [f"--format {recipe['format']}"]
    chosen += [f"--layout {recipe['layout']}"]
    chosen += [
        f"--{key.replace('_', '-')}" for key in ("quantize_head", "quantize_embeddings") if recipe[key]
    ]
    chosen += [f"--gptq-version {recipe['gptq_version']}"] if recipe.get("gptq_version") else []
    chosen += ["--double-quant"] if recipe.get("double_quant") else []
    calibration = recipe.get("calibration")
    if calibration:
        chosen += [f"--calibration {shlex.quote(calibration['text'])}"] if calibration["text"] else []
        chosen += [f"--calibration-windows {calibration['windows']}"]
    size = recipe.get("max_shard_size", Recipe.max_shard_size)
    chosen += [f"--max-shard-size {size}B"] if size != Recipe.max_shard_size else []
    chosen += ["--adapter LORA"] if report["source"]["adapter"] else []
    return " ".join(chosen)
