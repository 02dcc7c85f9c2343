"""What a model wrote, as content and calls of functions; also while it is still writing."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts.base import MessagePrompt, Prompt, TurnPrompt

_TRAINING_TIME = "[[训练时间]]"  # which the formats replace
_ASSISTANT = "<|assistant|>"  # between the messages of an answer
# ChatGLM-6B's answers get full-width marks beside Chinese characters, so the last one may still change.
_MAY_CHANGE = tuple(",!:;?")


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """Content, and the calls that go with it."""

    content: str
    calls: tuple[Call, ...] = ()


class AnswerReader:
    """Reads the text of an answer.

    The content of an unfinished answer is what will stay: a later one begins with it.

    Args:
        prompt: the format that the model was asked in; None takes the text as it is.
        functions: names that may be called.
        stop: texts that end an answer; what may become one is held back.
    """

    def __init__(
        self, prompt: Prompt | None, functions: Collection[str] = (), stop: Sequence[str] = ()
    ) -> None:
        self._prompt, self._functions, self._stop = prompt, frozenset(functions), tuple(stop)

    def read(self, text: str, finished: bool) -> Answer:
        """The answer in `text`."""
        if not finished:
            text = _settled(text, (*self._stop, _TRAINING_TIME, _ASSISTANT))
        if self._prompt is None:
            return Answer(text)
        if isinstance(self._prompt, MessagePrompt):
            return self._messages(self._prompt, text, finished)
        if not isinstance(self._prompt, TurnPrompt):
            return Answer(text.strip())
        content = self._prompt.process(text)
        return Answer(content if finished or not content.endswith(_MAY_CHANGE) else content[:-1])

    def _messages(self, prompt: MessagePrompt, text: str, finished: bool) -> Answer:
        """An answer may hold several messages; the first line of each is empty, or the function that it calls.

        A first line that names no function that was offered is part of what the model says.
        """
        said: list[str] = []
        calls: list[Call] = []
        *whole, last = text.split(_ASSISTANT)
        for part, complete in [*((p, True) for p in whole), (last, finished)]:
            first, line_break, rest = part.partition("\n")
            name = first.strip()
            if line_break and name in self._functions:
                if not complete:
                    break
                arguments = _as_json(prompt.call(name, rest, True).get("parameters"))
                if arguments is not None:
                    calls.append(Call(name, arguments))
                    continue
            elif not (line_break or complete) and any(f.startswith(name) for f in self._functions):
                break
            said.append(prompt.polish((part if name else rest if line_break else part).strip()))
        return Answer("\n".join(filter(None, said)), tuple(calls))


def _as_json(parameters: dict[str, Any] | None) -> str | None:
    """Arguments as JSON; None where JSON has no word for one, as for bytes, NaN or half a surrogate pair."""
    if parameters is None:
        return None
    try:
        written = json.dumps(parameters, ensure_ascii=False, allow_nan=False, default=_set_as_list)
        written.encode()
    except (TypeError, ValueError, RecursionError):
        return None
    return written


def _set_as_list(value: object) -> list[Any]:
    if isinstance(value, set):
        return list(value)
    raise TypeError(type(value).__name__)


def _settled(text: str, markers: Sequence[str]) -> str:
    """`text` without an end that may be the beginning of a marker."""
    for length in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return text[:-length]
    return text
