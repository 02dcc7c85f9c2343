"""ChatGLM3-6B's prompt: messages with roles, each encoded on its own."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from ..tokenizers.chatglm import ROLE_TOKENS
from ..tokenizers.kind import Kind
from .base import Message, MessagePrompt, Sampling
from .toolcall import call_arguments

_ROLE_TOKENS = re.compile("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")")


class ChatGLM3Prompt(MessagePrompt):
    """ChatGLM3-6B and -32K. History: a list of messages; tools are described in the system message.

    A tool call comes back as ``{"name", "parameters"}``; when the model wrote something other than a call
    with literal arguments, as ``{"name", "content"}``.
    """

    kind: ClassVar[Kind] = "chatglm3"
    name = "ChatGLM3-6B"
    # 8192 for ChatGLM3-6B, where the context ends.
    sampling = Sampling(max_length=32768, top_p=0.8, temperature=0.8)
    stop_tokens = ("</s>", "<|user|>", "<|observation|>")
    fallback = 5

    def prefix_ids(self) -> list[int]:
        """``[gMASK] sop``."""
        return [self.token("[gMASK]"), self.token("sop")]

    def message_ids(self, message: Message) -> list[int]:
        """The role, then metadata and content, each with the space that SentencePiece imagines in front."""
        content = message["content"]
        if message["role"] == "system" and "tools" in message:
            content += "\n" + self.tools_json(message["tools"])
        ids = [self.token(f"<|{message['role']}|>"), *self._encode(message.get("metadata", "") + "\n")]
        return ids + self._encode(content)

    def _encode(self, text: str) -> list[int]:
        if not self.encode_special_tokens:
            return self.plain(text)
        ids = []
        for part in _ROLE_TOKENS.split(text):
            ids += [self.token(part)] if part in ROLE_TOKENS else self.plain(part)
        return ids

    def call(self, name: str, content: str, tools: bool) -> dict[str, Any]:
        """Read ``tool_call(key=value, ...)`` from inside the code fence; nothing is evaluated."""
        if tools:
            # The first and the last line are the fence.
            parameters = call_arguments("\n".join(content.split("\n")[1:-1]))
            if parameters is not None:
                return {"name": name, "parameters": parameters}
        return {"name": name, "content": content}

    def polish(self, content: str) -> str:
        """Fill in the training time."""
        return content.replace("[[训练时间]]", "2023年")
