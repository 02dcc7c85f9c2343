"""Small models with the real numbers of rows, and answers written in advance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from helpers_tokenizers import original_folder, published, require_published
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, LogitsProcessor

import glmquant
from glmquant.models.chat import ChatMixin

ROWS = {"chatglm-6b": 130528, "chatglm2-6b": 65024, "chatglm3-6b": 65024, "glm-4-9b-chat": 151552}
# The fast tokenizers are those of converted folders; ChatGLM-6B has none.
SOURCES = [(name, "original") for name in ROWS] + [(name, "fast") for name in list(ROWS)[1:]]


class SmallGlm(ChatMixin, GlmForCausalLM):
    """A random model; with a `Script`, what it computes does not matter."""

    forwarded: int

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        self.forwarded += input_ids.shape[1]
        return super().forward(input_ids, **kwargs)


@functools.cache
def small_model(name: str, context: int = 128000) -> SmallGlm:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=ROWS[name], hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=context, pad_token_id=0,
    )  # fmt: skip
    model = SmallGlm(config).eval()
    model.forwarded = 0
    # Else random models repeat themselves.
    torch.nn.init.normal_(model.lm_head.weight)
    return model


@functools.cache
def tokenizer_of(name: str, source: str = "original") -> Any:
    require_published(name)
    if source == "fast":
        return published(name).tokenizer
    return glmquant.load_tokenizer(original_folder(name))


class Script(LogitsProcessor):
    """Makes any model answer `ids`, and notes the prompt."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.prompt: list[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt is None:
            self.prompt = input_ids[0].tolist()
        row = self.ids[input_ids.shape[1] - len(self.prompt)]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, row] = 0
        return forced
