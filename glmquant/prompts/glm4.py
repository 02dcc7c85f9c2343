"""GLM-4-9B-chat's prompt: messages with roles; a role, its metadata and the content are one text.

What tools look like to the model is in the chat template that comes with the tokenizer; the text is taken
from there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from ..errors import UsageError
from ..tokenizers.kind import Kind
from .base import Message, MessagePrompt, Sampling

_BUILT_IN = ("python", "simple_browser", "cogview")


class GLM4Prompt(MessagePrompt):
    """GLM-4-9B-chat. History: a list of messages; tools are described in the system message.

    No ``chat()`` was published for it: this is ChatGLM3's interface. A function call comes back as
    ``{"name", "parameters"}``, a call of a built-in tool (python, ...) as ``{"name", "content"}``.
    """

    kind: ClassVar[Kind] = "glm4"
    name = "GLM-4-9B-chat"
    sampling = Sampling(max_length=128000, top_p=0.8, temperature=0.8)
    stop_tokens = ("<|endoftext|>", "<|user|>", "<|observation|>")
    fallback = 198

    def prefix_ids(self) -> list[int]:
        """``[gMASK] <sop>``."""
        return [self.token("[gMASK]"), self.token("<sop>")]

    def ids(self, query: str, history: list[Message], role: str = "user") -> list[int]:
        """As the published template, except that text cannot become a special token."""
        if not self.encode_special_tokens:
            return super().ids(query, history, role)
        message = {"role": self._role(role), "content": self._text(query, "the query")}
        messages = [
            {**each, "tools": self._tools(each["tools"])} if "tools" in each else each
            for each in (*history, message)
        ]
        text = self._render(messages, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))

    def message_ids(self, message: Message) -> list[int]:
        """Tools as a system message, then role, metadata and content; without content there is no message.

        Metadata, line break and content are encoded together, as they are in the template. (THUDM's
        build_single_message encodes the content on its own, which differs where it begins with a line break.)
        """
        ids = []
        if "tools" in message:
            tools = self._tools(message["tools"])
            shown = self._render([{"role": "system", "content": "", "tools": tools}])
            ids += [self.token("<|system|>"), *self.plain(shown.partition("<|system|>")[2])]
        if message["content"]:
            said = f"{message.get('metadata', '')}\n{message['content']}"
            ids += [self.token(f"<|{message['role']}|>"), *self.plain(said)]
        return ids

    def _render(self, messages: list[Message], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template, which says how GLM-4 is told of tools; "
                "take the tokenizer_config.json that was published with the model."
            )
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _tools(self, tools: object) -> list[Any]:
        # The template passes over what it does not know, without a word.
        self.tools_json(tools)
        shown = []
        for tool in tools if isinstance(tools, list) else [tools]:
            named = tool.get("function", tool) if isinstance(tool, dict) else None
            if isinstance(named, dict) and isinstance(named.get("name"), str):
                shown.append({"type": "function", "function": named})
            elif isinstance(tool, dict) and tool.get("type") in _BUILT_IN:
                shown.append(tool)
            else:
                raise UsageError(
                    f'{tool!r:.80} is no description of a tool: GLM-4 takes {{"type": "function", "function": '
                    f'{{"name": ...}}}}, or as the type one of {", ".join(_BUILT_IN)}.'
                )
        return shown

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids; special tokens among them are spelled out, with no spaces around them."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, spaces_between_special_tokens=False)
        )

    def call(self, name: str, content: str, tools: bool) -> dict[str, Any]:
        """Read the arguments of a function, which GLM-4 writes as a JSON object."""
        if tools:
            try:
                parameters = json.loads(content)
            except (ValueError, RecursionError):
                parameters = None
            if isinstance(parameters, dict):
                return {"name": name, "parameters": parameters}
        return {"name": name, "content": content}
