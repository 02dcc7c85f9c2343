"""Conversations for any other tokenizer that brings a chat template: what a checkpoint of this architecture was
trained to talk with, where that is not one of THUDM's formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UsageError
from .base import History, Message, Prompt, Sampling


class TemplatePrompt(Prompt):
    """The tokenizer's own chat template. History: a list of messages with ``role`` and ``content``.

    The template is rendered to text and encoded as a whole, so here text that spells a special token does become
    that token, as everywhere where such models are served.
    """

    kind = "template"
    name = "this tokenizer"
    sampling = Sampling(max_length=2**31, top_p=0.8, temperature=0.8)
    stop_tokens = ()

    def __init__(self, tokenizer: Any, *, encode_special_tokens: bool = False) -> None:
        super().__init__(tokenizer, encode_special_tokens=encode_special_tokens)
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer states no eos_token, so there is no telling where an answer ends."
            )
        self.fallback = int(tokenizer.eos_token_id)

    def history(self, history: Any) -> list[Message]:
        """Check messages: a role and content."""
        if history is None:
            return []
        form = 'a list of messages such as {"role": "user", "content": "..."}'
        if not isinstance(history, (list, tuple)) or not all(isinstance(entry, dict) for entry in history):
            raise UsageError(f"{self.name} takes history as {form}; {history!r:.80} does not fit.")
        for message in history:
            self._text(message.get("role"), "the role of a message")
            self._text(message.get("content"), f"the content of the {message['role']} message")
        return [dict(message) for message in history]

    def ids(self, query: str, history: History, role: str = "user") -> list[int]:
        """What the template makes of the messages.

        Raises:
            UsageError: the template refuses them.
        """
        messages = [*history, {"role": role, "content": self._text(query, "the query")}]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates raise what they like
            raise UsageError(f"the tokenizer's chat template refuses this conversation: {error}") from None
        return list(ids)

    def reply(self, text: str, query: str, history: History, role: str = "user") -> tuple[str, list[Message]]:
        """The answer as it is, and the history with it."""
        answer = text.strip()
        said = {"role": role, "content": query}
        return answer, [*history, said, {"role": "assistant", "content": answer}]

    def shorten(self, history: History) -> list[Message] | None:
        """Drop the first exchange; a system message at the front stays."""
        keep = 1 if history and history[0]["role"] == "system" else 0
        if len(history) == keep:
            return None
        later = keep + 1
        while later < len(history) and history[later]["role"] != "user":
            later += 1
        return [*history[:keep], *history[later:]]

    def stop_ids(self) -> list[int]:
        """The tokenizer's eos; `chat` adds those of the model's generation_config."""
        return [self.fallback]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
