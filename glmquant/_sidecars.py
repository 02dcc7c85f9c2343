"""The files beside the weights: configuration, generation defaults, tokenizer, licences.

No file that this module writes asks a reader to run code from the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import families, formats
from .checkpoint.files import CARRIED, check_inside, read_json
from .formats import StoredWeight
from .plan import Plan
from .prompts.chatglm2 import ChatGLM2Prompt


def sidecar_files(folder: Path, source_config: Mapping[str, Any], plan: Plan) -> dict[str, bytes]:
    """Everything but the weights and the report, by file name."""
    files = {}
    for pattern in CARRIED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                check_inside(folder, path.name, "the checkpoint folder")
                files[path.name] = path.read_bytes()
    files["config.json"] = to_json(output_config(source_config, plan))
    repo = repository_name(source_config)
    if "tokenizer_config.json" in files:
        tokenizer = read_json(folder / "tokenizer_config.json")
        native = plan.recipe.layout == "native"
        files["tokenizer_config.json"] = to_json(without_code(tokenizer, None if native else repo))
    if plan.recipe.layout == "native":
        from .tokenizers import fast_tokenizer_files, kind_of

        files.update(fast_tokenizer_files(folder) or {})
        defaults = generation_config(source_config, plan, has_roles=kind_of(folder) != "chatglm2")
        files.setdefault("generation_config.json", to_json(defaults))
    return dict(sorted(files.items()))


def output_config(source_config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """``config.json`` of the output."""
    family = families.FAMILIES[plan.family]
    if plan.recipe.layout == "native" and family.native_config is not None:
        config = family.native_config(source_config)
    else:
        config = without_code(dict(source_config), repository_name(source_config))
        config.update(family.original_config(source_config))
    weights = [
        StoredWeight(i.name, i.scheme, (i.shape[0], i.shape[1]), i.role) for i in plan.items if i.scheme
    ]
    quantized = {weight.name for weight in weights}
    heads = (
        t.name for t in family.in_layout(plan.dims, str(plan.recipe.layout)) if t.role is families.Role.HEAD
    )
    # A head that is tied to the embedding is not among the items, but it is a module that readers find.
    # Nor need every linear layer be quantized: where memory allows, some stay as they are.
    linears = (item.name for item in plan.items if item.role is families.Role.LINEAR and quantized)
    left = [name.removesuffix(".weight") for name in [*heads, *linears] if name not in quantized]
    config.update(formats.of(plan.recipe).config(plan.recipe, family, weights, left))
    return config


def generation_config(source_config: Mapping[str, Any], plan: Plan, *, has_roles: bool) -> dict[str, Any]:
    """Sampling defaults of the original ``chat()``, for models whose folders lack a generation_config.json.

    `has_roles`: the tokenizer may be ChatGLM3's, whose answers end where the next role begins.
    """
    sampling = ChatGLM2Prompt.sampling  # ChatGLM3-6B's too; GLM-4's folders have the file
    defaults = {
        "do_sample": True,
        "eos_token_id": families.FAMILIES[plan.family].stop_ids(source_config, has_roles),
        "max_length": min(sampling.max_length, plan.dims.context),
        "pad_token_id": source_config.get("pad_token_id"),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    return {key: value for key, value in defaults.items() if value is not None}


def without_code(config: dict[str, Any], repository: str | None) -> dict[str, Any]:
    """`config` with ``auto_map`` pointing at `repository` (``org/name--module.Class``), or without it.

    A bare module name would make a loader run Python from the folder, and no Python is carried along.
    """
    auto_map = config.pop("auto_map", None)
    if isinstance(auto_map, dict) and repository:
        config["auto_map"] = {key: _qualified(value, repository) for key, value in auto_map.items()}
    return config


def _qualified(value: Any, repository: str) -> Any:
    if isinstance(value, str):
        return value if "--" in value else f"{repository}--{value}"
    if isinstance(value, list):  # tokenizers: [slow, fast]
        return [_qualified(v, repository) for v in value]
    return value


def repository_name(config: Mapping[str, Any]) -> str | None:
    """The model on Hugging Face that ``config.json`` names as its origin."""
    name = config.get("_name_or_path")
    # Fine-tunes often name a folder here, ./model or ../model: code would then be looked for on the reader's disk.
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face folders have it: two spaces, sorted, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
