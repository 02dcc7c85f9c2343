"""ChatGLM-6B's golden data and the models that it describes.

The reference data of the project lies beside the repository or where GLMQUANT_SHARED says; tests/golden has a part.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers_formats import GOLDEN, load_json
from safetensors.torch import load_file
from torch import Tensor

from glmquant import families, formats
from glmquant.checkpoint.source import open_folder
from glmquant.models.chatglm import ChatGLMForConditionalGeneration
from glmquant.models.chatglm_config import ChatGLMConfig

SHARED = Path(os.environ.get("GLMQUANT_SHARED", GOLDEN.parents[2] / "shared"))
MODELS = ("tiny-3l", "tiny-28l")


def golden_file(name: str) -> Path:
    """A file or folder of chatglm-6b's golden data; the test is skipped where it is not at hand."""
    # expected/ is apart here, so that a model's folder has its weights and nothing else
    for folder in (SHARED / "golden/chatglm-6b", GOLDEN / "chatglm-6b", GOLDEN / "chatglm-6b/expected"):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"needs golden/chatglm-6b/{name} of the reference data (GLMQUANT_SHARED, or ../shared)")


@cache
def expected(model: str) -> dict[str, Tensor]:
    return load_file(golden_file(f"{model}/expected.safetensors"))


def cases(model: str, quantity: str) -> list[str]:
    """The cases with this quantity; those of a bare clone where the data is not at hand."""
    try:
        names = expected(model)
    except pytest.skip.Exception:
        names = load_file(GOLDEN / "chatglm-6b/expected/tiny-3l/expected.safetensors")
    return sorted(name.removesuffix("." + quantity) for name in names if name.endswith("." + quantity))


def real_tokens(model: str, case: str) -> Tensor:
    """bool [batch, length]: which tokens of a case are no padding (the golden pad id is 3)."""
    golden = expected(model)
    if f"{case}.valid" in golden:
        return golden[f"{case}.valid"]
    return torch.ones_like(golden[f"{case}.input_ids"], dtype=torch.bool)


@cache
def load(model: str, attention: str = "sdpa") -> ChatGLMForConditionalGeneration:
    """A golden model in float32 by transformers' own loading, which must find every tensor and no others."""
    loaded, report = ChatGLMForConditionalGeneration.from_pretrained(
        golden_file(f"{model}/config.json").parent,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return loaded.eval()


def decode(folder: Path) -> ChatGLMForConditionalGeneration:
    """The float32 model of any folder: shards, and THUDM's INT4 or INT8, by the code that `convert` reads with."""
    source = open_folder(folder)
    family, fmt = families.detect(source.config), formats.detect(source.config)
    stored = {name: source.read(name) for name in source.infos() if not name.endswith("inv_freq")}
    for weight in fmt.quantized(source.config, family, family.dims(source.config)):
        parts = [t.name for t in fmt.outputs(weight.name, weight.shape, weight.scheme)]
        stored[weight.name] = fmt.decode({p: stored.pop(p) for p in parts}, weight).dequantize()
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**source.config))
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return model.eval()


def generation(folder: str) -> dict[str, dict]:
    return load_json(golden_file(f"{folder}/generate.json"))
