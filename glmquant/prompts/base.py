"""What the prompt formats share: plain text to ids, forms of history, errors.

A prompt is built as ids, piece by piece: only the format itself puts special tokens in. What a user, a
tool or an earlier answer says is encoded as plain text, so no message can forge a role or an end.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import UsageError
from ..tokenizers.kind import Kind

Message = dict[str, Any]
Turn = tuple[str, str]
History = list[Any]
# The text of an answer, or a tool call: {"name", "parameters"} or {"name", "content"}.
Response = str | dict[str, Any]

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True)
class Sampling:
    """Defaults of the published ``chat()``.

    Attributes:
        max_length: tokens of prompt and answer together; a model with a shorter context has its own limit.
        top_p: the smallest set of tokens with this probability is sampled from.
        temperature: what the logits are divided by.
    """

    max_length: int
    top_p: float
    temperature: float


class Prompt(ABC):
    """One generation's conversation format, for one tokenizer.

    Works with THUDM-style tokenizers and with the fast tokenizer of a converted folder; the ids are the same.

    Args:
        tokenizer: a tokenizer of this generation.
        encode_special_tokens: let text that spells a special token become one, as far as the published
            code did. Not for text from a stranger.

    Attributes:
        name: the model, for messages.
        sampling: defaults of ``chat()``.
        stop_tokens: an answer ends with one of these.
        fallback: the token to choose when a row of scores holds no numbers.
    """

    kind: ClassVar[Kind | Literal["template"]]
    name: ClassVar[str]
    sampling: ClassVar[Sampling]
    stop_tokens: ClassVar[tuple[str, ...]]
    fallback: int

    def __init__(self, tokenizer: Any, *, encode_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.encode_special_tokens = encode_special_tokens

    @abstractmethod
    def history(self, history: Any) -> History:
        """Check `history` and copy it.

        Raises:
            UsageError: it has not the form that this generation takes.
        """

    @abstractmethod
    def ids(self, query: str, history: History, role: str = "user") -> list[int]:
        """The ids that ask for an answer to `query` after `history`, as the published ``chat()`` built them.

        Args:
            query: what `role` says now.
            history: as `history` returned it.
            role: who speaks; ``observation`` hands back the result of a tool.

        Raises:
            UsageError: this generation has no such role, or a text cannot be encoded.
        """

    @abstractmethod
    def reply(self, text: str, query: str, history: History, role: str = "user") -> tuple[Response, History]:
        """What to make of the decoded answer: the response, and the history with `query` and the answer."""

    @abstractmethod
    def shorten(self, history: History) -> History | None:
        """The history without its oldest exchange; None when nothing is left to drop."""

    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return [self.token(text) for text in self.stop_tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids; special tokens among them are spelled out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def plain(self, text: str) -> list[int]:
        """The ids of `text`, in which nothing becomes a special token."""
        checked_text(text, "the text")
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def check(self, ids: Sequence[int]) -> None:  # noqa: B027  # most models read any ids
        """Refuse ids from elsewhere that are no prompt of this model.

        Raises:
            UsageError: a token is missing without which the model cannot read them.
        """

    def token(self, text: str) -> int:
        """The id of a special token.

        Raises:
            UsageError: the tokenizer does not have it.
        """
        row = token_id(self.tokenizer, text)
        if row is None:
            raise UsageError(
                f"the tokenizer has no token {text}, which {self.name}'s prompts need; use the tokenizer of that model."
            )
        return row

    def _text(self, value: object, what: str) -> str:
        if not isinstance(value, str):
            raise UsageError(f"{what} must be text, not {type(value).__name__} ({value!r:.60}).")
        return checked_text(value, what)


def checked_text(text: str, what: str) -> str:
    """`text`, in which each character is one.

    Raises:
        UsageError: half of a surrogate pair is none; tokenizers fail on it, or put something else in its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} holds half of a surrogate pair, which is no character.") from None
    return text


def token_id(tokenizer: Any, text: str) -> int | None:
    """The id of a token; None when `tokenizer` does not have it."""
    row = tokenizer.convert_tokens_to_ids(text)
    # What is unknown has the id of <unk>, which THUDM-style tokenizers do not state.
    return None if row == tokenizer.convert_tokens_to_ids("<no such token>") else int(row)


class TurnPrompt(Prompt):
    """ChatGLM-6B and ChatGLM2-6B: the conversation is one text, the history a list of (query, answer)."""

    def history(self, history: Any) -> list[Turn]:
        """Check (query, answer) pairs; user and assistant messages in turn are accepted too."""
        if history is None:
            return []
        if not isinstance(history, (list, tuple)):
            raise self._form(history)
        if history and all(isinstance(entry, dict) for entry in history):
            return self._from_messages(history)
        turns = []
        for entry in history:
            if not isinstance(entry, (list, tuple)) or len(entry) != 2:
                raise self._form(entry)
            turns.append((self._text(entry[0], "a query"), self._text(entry[1], "an answer")))
        return turns

    def _from_messages(self, messages: Sequence[Message]) -> list[Turn]:
        if messages[0].get("role") == "system":
            raise UsageError(f"{self.name} has no system role; say it in the first query.")
        for message, role in zip(messages, ("user", "assistant") * len(messages), strict=False):
            if message.get("role") != role or len(messages) % 2:
                raise self._form(message)
        texts = [self._text(message.get("content"), "the content of a message") for message in messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    def _form(self, found: object) -> UsageError:
        return UsageError(
            f"{self.name} takes history as a list of (query, answer) pairs (or user and assistant messages in turn; "
            f"it has no other roles); {found!r:.80} does not fit."
        )

    @abstractmethod
    def text(self, query: str, history: Sequence[Turn]) -> str:
        """The prompt as text."""

    @abstractmethod
    def process(self, text: str) -> str:
        """An answer as the published ``process_response`` returns it."""

    def _checked(self, query: str, role: str) -> str:
        if role != "user":
            raise UsageError(f"{self.name} has no role {role!r}; only a user speaks to it.")
        return self._text(query, "the query")

    def reply(self, text: str, query: str, history: list[Turn], role: str = "user") -> tuple[str, list[Turn]]:
        """The processed answer, and the history with it."""
        answer = self.process(text)
        return answer, [*history, (query, answer)]

    def shorten(self, history: list[Turn]) -> list[Turn] | None:
        """Drop the first turn."""
        return history[1:] if history else None


class MessagePrompt(Prompt):
    """ChatGLM3-6B and GLM-4-9B-chat: the conversation is a list of messages with roles."""

    def history(self, history: Any) -> list[Message]:
        """Check messages: a role, content, and where there is a tool, metadata or tools."""
        if history is None:
            return []
        if not isinstance(history, (list, tuple)) or not all(isinstance(entry, dict) for entry in history):
            raise UsageError(
                f"{self.name} takes history as a list of messages such as "
                f'{{"role": "user", "content": "..."}}; {history!r:.80} does not fit.'
            )
        for message in history:
            self._role(message.get("role"))
            self._text(message.get("content"), f"the content of the {message['role']} message")
            self._text(message.get("metadata", ""), f"the metadata of the {message['role']} message")
        return [dict(message) for message in history]

    def _role(self, role: object) -> str:
        if role not in ROLES:
            raise UsageError(f"{self.name} has no role {role!r}; it knows {', '.join(ROLES)}.")
        return str(role)

    @abstractmethod
    def message_ids(self, message: Message) -> list[int]:
        """The ids of one message."""

    def ids(self, query: str, history: list[Message], role: str = "user") -> list[int]:
        """Prefix, then message by message, then the token that asks for the assistant."""
        message = {"role": self._role(role), "content": self._text(query, "the query")}
        ids = self.prefix_ids()
        for each in (*history, message):
            ids += self.message_ids(each)
        return [*ids, self.token("<|assistant|>")]

    def tools_json(self, tools: object) -> str:
        """Tools as a system message shows them.

        Raises:
            UsageError: they are no JSON, or no text.
        """
        try:
            text = json.dumps(tools, indent=4, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the tools of the system message are no JSON: {error}.") from None
        return checked_text(text, "the description of the tools")

    @abstractmethod
    def prefix_ids(self) -> list[int]:
        """The ids that every prompt begins with."""

    @abstractmethod
    def call(self, name: str, content: str, tools: bool) -> dict[str, Any]:
        """A tool call as a response.

        Args:
            name: the tool.
            content: what the model wrote to it.
            tools: whether the conversation's system message describes tools.
        """

    def reply(
        self, text: str, query: str, history: list[Message], role: str = "user"
    ) -> tuple[Response, list[Message]]:
        """Split the answer into messages; the last one is the response."""
        return self.process(text, [*history, {"role": role, "content": query}])

    def process(self, text: str, history: list[Message]) -> tuple[Response, list[Message]]:
        """What the published ``process_response`` returns: the response, and the history with the answer.

        An answer may hold several messages, each after an ``<|assistant|>``. In each, the first line is
        metadata: empty for an answer in words, else the name of a tool, and the rest is for the tool.
        """
        history = list(history)
        tools = bool(history) and history[0].get("role") == "system" and "tools" in history[0]
        response: Response = ""
        for part in text.split("<|assistant|>"):
            first, line_break, rest = part.partition("\n")
            metadata, content = (first, rest) if line_break else ("", part)
            if metadata.strip():
                response = self.call(metadata.strip(), content, tools)
            else:
                content = content.strip()
                response = self.polish(content)
            history.append({"role": "assistant", "metadata": metadata, "content": content})
        return response, history

    def polish(self, content: str) -> str:
        """An answer in words as it is returned; the history keeps it as it was."""
        return content

    def shorten(self, history: list[Message]) -> list[Message] | None:
        """Drop the first exchange; a system message at the front stays."""
        keep = 1 if history and history[0]["role"] == "system" else 0
        if len(history) == keep:
            return None
        later = keep + 1
        while later < len(history) and history[later]["role"] not in ("user", "system"):
            later += 1
        return [*history[:keep], *history[later:]]
