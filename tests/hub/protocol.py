"""What goes between the server and its routes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .repositories import StoredFile

TOKEN = "hf_secret"
"""Who has it may do everything."""


@dataclass
class Request:
    """A request as it came, and what became of it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0
    sent: int = 0
    """bytes of the body that were sent"""

    @property
    def token(self) -> str | None:
        """What it identified itself with."""
        text = self.headers.get("authorization", "")
        return text.removeprefix("Bearer ") if text.startswith("Bearer ") else None


@dataclass
class Fault:
    """Something that goes wrong with requests whose path or query holds `where`.

    Attributes:
        status: answered instead of what was asked for; with it `headers`.
        cut: the connection ends after this share of the body, of the answer or of what is sent.
        flip: one bit of this byte of the file is changed.
        times: how often it happens.
        method: requests that it happens to.
    """

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: float | None = None
    flip: int | None = None
    times: int = 1
    method: str = "GET"


@dataclass
class Answer:
    """What a route answers: JSON, or (part of) a file, or nothing but headers."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: StoredFile | None = None
    ranges: bool = True

    @classmethod
    def of_json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, {"Content-Type": "application/json", **named}, json.dumps(value).encode())
