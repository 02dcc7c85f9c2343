"""The messages of a request as a conversation that a model's prompt format takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts import History, Prompt
from ..prompts.base import MessagePrompt, TurnPrompt
from .errors import ApiError
from .schemas import ChatMessage, Function, FunctionCall

_ASK_WITH_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"
_ROLES = {"developer": "system", "tool": "observation", "function": "observation"}


@dataclass(frozen=True)
class Conversation:
    """What is said now, by whom, and what was said before."""

    query: str
    history: History
    role: str = "user"

    def length(self, most: int) -> int:
        """Characters of it, as the prompt writes them; counting ends beyond `most`.

        Raises:
            ApiError: tools are nested too deeply to be written.
        """
        count = len(self.query)
        for entry in self.history:
            texts = (entry.get("metadata", ""), entry["content"]) if isinstance(entry, dict) else entry
            count += sum(map(len, texts))
            if isinstance(entry, dict) and "tools" in entry:
                # Each line is indented by its depth, so a small description may be a very long text.
                try:
                    for part in json.JSONEncoder(indent=4, ensure_ascii=False).iterencode(entry["tools"]):
                        count += len(part)
                        if count > most:
                            break
                except RecursionError:
                    raise _wrong("tools", "parameters are nested too deeply.") from None
        return count

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids that ask for an answer."""
        return prompt.ids(self.query, prompt.history(self.history), self.role)


def from_pairs(prompt: Prompt, query: str, pairs: Sequence[tuple[str | None, str | None]]) -> Conversation:
    """A conversation of (query, answer) pairs, for any model."""
    if isinstance(prompt, TurnPrompt):
        return Conversation(query, [(asked or "", answer or "") for asked, answer in pairs])
    messages = []
    for asked, answer in pairs:
        messages.append({"role": "user", "content": asked or ""})
        messages.append({"role": "assistant", "content": answer or ""})
    return Conversation(query, messages)


def from_messages(
    prompt: Prompt, messages: Sequence[ChatMessage], functions: Sequence[Function]
) -> Conversation:
    """A conversation of messages.

    Raises:
        ApiError: an answer to the model itself is asked for, or tools are for a model that knows none.
    """
    last = messages[-1]
    if last.role == "assistant":
        raise _wrong("messages", "the last message is the assistant's; end with one that it is to answer.")
    if last.role in ("system", "developer"):
        raise _wrong(
            "messages", "the last message is an instruction; end with one of the user's or a tool's."
        )
    if isinstance(prompt, MessagePrompt):
        said = _with_tools(prompt, [part for m in messages for part in _spoken(prompt, m)], functions)
    elif functions or any(m.tool_calls or m.function_call for m in messages):
        raise _wrong("tools", f"{prompt.name} cannot call functions; only ChatGLM3-6B and GLM-4-9B-chat can.")
    else:
        said = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in messages]
    *history, query = said
    if isinstance(prompt, TurnPrompt):
        # They have no system role; as in THUDM's server for ChatGLM2, the first query says it.
        instructions = [m["content"] for m in history if m["role"] == "system"]
        history = [m for m in history if m["role"] != "system"]
        first = history[0] if history else query
        first["content"] = "\n".join([*instructions, first["content"]])
    return Conversation(query["content"], history, query["role"])


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _with_tools(
    prompt: MessagePrompt, said: list[dict[str, Any]], functions: Sequence[Function]
) -> list[dict[str, Any]]:
    if not functions:
        return said
    tools = [function.model_dump(exclude_none=True) for function in functions]
    if said[0]["role"] == "system":
        return [{**said[0], "tools": tools}, *said[1:]]
    # GLM-4's template says by itself what the tools are for.
    content = _ASK_WITH_TOOLS if prompt.kind == "chatglm3" else ""
    return [{"role": "system", "content": content, "tools": tools}, *said]


def _spoken(prompt: MessagePrompt, message: ChatMessage) -> list[dict[str, Any]]:
    """A message as the format has it: each call of a function is a message of its own."""
    role = _ROLES.get(message.role, message.role)
    calls = [call.function for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append(message.function_call)
    if role != "assistant" or not calls:
        return [{"role": role, "content": message.text}]
    spoken = [{"role": role, "metadata": call.name, "content": _written(prompt, call)} for call in calls]
    return [{"role": role, "content": message.text}, *spoken] if message.text else spoken


def _written(prompt: MessagePrompt, call: FunctionCall) -> str:
    """A call as the model would have written it."""
    if prompt.kind != "chatglm3":
        return call.arguments
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict) and all(map(str.isidentifier, arguments)):
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    else:
        written = call.arguments
    return f"```python\ntool_call({written})\n```"
