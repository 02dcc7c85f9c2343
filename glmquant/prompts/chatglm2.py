"""ChatGLM2-6B's prompt: numbered rounds from 1, special tokens in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..tokenizers.kind import Kind
from .base import Sampling, Turn, TurnPrompt


class ChatGLM2Prompt(TurnPrompt):
    """ChatGLM2-6B. History: a list of (query, answer)."""

    kind: ClassVar[Kind] = "chatglm2"
    name = "ChatGLM2-6B"
    sampling = Sampling(max_length=8192, top_p=0.8, temperature=0.8)
    stop_tokens = ("</s>",)
    fallback = 5

    def text(self, query: str, history: Sequence[Turn]) -> str:
        """The prompt as text."""
        rounds = [
            f"[Round {i}]\n\n问：{asked}\n\n答：{answer}\n\n" for i, (asked, answer) in enumerate(history, 1)
        ]
        return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def ids(self, query: str, history: list[Turn], role: str = "user") -> list[int]:
        """``[gMASK] sop``, then the text."""
        text = self.text(self._checked(query, role), history)
        return [self.token("[gMASK]"), self.token("sop"), *self.plain(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def process(self, text: str) -> str:
        """Strip, and fill in the training time."""
        return text.strip().replace("[[训练时间]]", "2023年")
