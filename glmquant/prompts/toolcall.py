"""Reading the call that a model wrote as Python, without running it."""

from __future__ import annotations

import ast
from typing import Any


def call_arguments(code: str) -> dict[str, Any] | None:
    """The keyword arguments of ``tool_call(key=value, ...)``.

    THUDM's code hands `code`, which a model wrote, to ``eval``. Here only literals are read: numbers, text,
    lists, tuples, dictionaries, sets, True, False and None.

    Returns:
        The arguments, or None when `code` is anything else: another name, a positional argument, an expression
        that would have to be computed, or no Python.
    """
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not (
            isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"
        ):
            return None
        if call.args:
            return None
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in arguments:
                return None
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return arguments
