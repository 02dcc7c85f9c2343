"""The command line with a model that repeats what it is asked, slowly: ``python tests/fake_chat.py chat OUT``.

What it was called with goes to the file that FAKE_CHAT_LOG names, one JSON value a line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import glmquant
from glmquant.errors import UsageError


class Parrot:
    """Answers `query` with itself, a character every FAKE_CHAT_DELAY seconds; has both forms of history."""

    def stream_chat(
        self, tokenizer: Any, query: str, history: list[Any], **options: Any
    ) -> Iterator[tuple[Any, list[Any]]]:
        log("asked", query, history, options)
        if query == "too long":
            raise UsageError("the prompt is too long.")
        if query == "tool":
            yield {"name": "weather", "parameters": {"city": "Oslo"}}, history
            return
        dicts = query.startswith("dict ")
        try:
            for stop in range(1, len(query) + 1):
                time.sleep(float(os.environ.get("FAKE_CHAT_DELAY", "0")))
                answer = query[:stop]
                said = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
                yield answer, [*history, *(said if dicts else [(query, answer)])]
        finally:
            log("ended")


class Tokenizer:
    """Only says whose it is."""

    kind = "chatglm3"


def log(*values: Any) -> None:
    if path := os.environ.get("FAKE_CHAT_LOG"):
        with Path(path).open("a") as file:
            file.write(json.dumps(values) + "\n")


def load(path: str, **options: Any) -> Parrot:
    log("load", path, options)
    return Parrot()


def load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer()


if __name__ == "__main__":
    from glmquant.cli import main

    glmquant.load, glmquant.load_tokenizer = load, load_tokenizer
    main()
