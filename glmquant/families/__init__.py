"""The model families glmquant knows, and how to tell them apart."""

from __future__ import annotations

from ..errors import SourceError
from . import chatglm, chatglm2, glm
from .base import (
    Config,
    Dims,
    Family,
    Fold,
    LayoutTensor,
    LinearUnit,
    Part,
    Role,
    TensorRule,
    TensorSpec,
    stated_dtype,
)

__all__ = [
    "FAMILIES",
    "Config",
    "Dims",
    "Family",
    "Fold",
    "LayoutTensor",
    "LinearUnit",
    "Part",
    "Role",
    "TensorRule",
    "TensorSpec",
    "detect",
    "stated_dtype",
]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (chatglm.FAMILY, chatglm2.FAMILY, glm.FAMILY, glm.FAMILY_GLM4)
}

KNOWN = (
    "ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, ChatGLM3-6B-32K, GLM-4-9B-chat (model_type chatglm), glm and glm4"
)


def detect(config: Config) -> Family:
    """The family of a ``config.json``.

    All THUDM models say ``chatglm``; the first generation is the one with `inner_hidden_size` and no
    `padded_vocab_size`.

    Raises:
        SourceError: naming what was found and what is known.
    """
    model_type = config.get("model_type")
    if model_type == "chatglm":
        if "padded_vocab_size" in config:
            return chatglm2.FAMILY
        if "inner_hidden_size" in config:
            return chatglm.FAMILY
        raise SourceError(
            "config.json says model_type 'chatglm' but has neither inner_hidden_size (ChatGLM-6B) nor "
            "padded_vocab_size (ChatGLM2-6B and later); the file may be incomplete."
        )
    if model_type in ("glm", "glm4"):
        return FAMILIES[str(model_type)]
    architectures = config.get("architectures")
    found = f"model_type {model_type!r}" if model_type else "no model_type"
    if architectures:
        found += f", architectures {architectures}"
    raise SourceError(f"unknown architecture: config.json has {found}; known are {KNOWN}.")
