"""The methods of THUDM's models that people call beside `chat`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..prompts import ChatGLM2Prompt, ChatGLMPrompt, History, prompt_for
from .streaming import generate_tokens


class BesideChatMixin:
    """Gives a model class `build_inputs`, `process_response` and `stream_generate`."""

    def build_inputs(self, tokenizer: Any, query: str, history: History | None = None) -> Any:
        """The prompt of `chat` as a batch of one: input_ids and attention_mask [1, seq], on the model's device."""
        prompt = prompt_for(tokenizer)
        ids = prompt.ids(query, prompt.history(history))
        device = self.device  # type: ignore[attr-defined]
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(device)

    def process_response(self, response: str) -> str:
        """What ChatGLM-6B and ChatGLM2-6B make of a decoded answer; the later ones need the history for that."""
        first = self.config.model_type == "chatglm"  # type: ignore[attr-defined]
        return (ChatGLMPrompt if first else ChatGLM2Prompt)(None).process(response)

    def stream_generate(self, input_ids: Tensor, **kwargs: Any) -> Iterator[Tensor]:
        """Generate, and yield the ids [1, seq] so far, prompt included, after each token.

        Args:
            input_ids: the prompt [1, seq].
            kwargs: for `generate`.
        """
        with closing(generate_tokens(self, input_ids, **kwargs)) as tokens:
            for row in tokens:
                input_ids = torch.cat([input_ids, input_ids.new_tensor([[row]])], 1)
                yield input_ids
