"""Which of THUDM's tokenizers a folder holds.

ChatGLM-6B's vocabulary has a file name of its own, and GLM-4's a format of its own.
ChatGLM2 and ChatGLM3 have the same vocabulary, byte for byte, and the same tokenizer class name;
what differs is the code (four role tokens behind ChatGLM2's five) and the prompt format. The
evidence for the one or the other, strongest first:

1. The Python files, if they were downloaded, read as text: only ChatGLM3's know ``<|user|>``.
2. The tokens and the chat template in ``tokenizer_config.json`` (a re-saved tokenizer lists its
   tokens; no published ChatGLM2 has a template).
3. The names in ``tokenizer_config.json`` and ``config.json``, such as ``THUDM/chatglm2-6b``.
4. ``config.json``: the published ChatGLM2-6B has ``seq_length`` 32768 and no ``rope_ratio``;
   ChatGLM3-6B has 8192, and ChatGLM3-6B-32K has a ``rope_ratio``.

With no evidence at all it is ChatGLM3, whose tokens include all of ChatGLM2's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from .common import Json, optional_json

Kind = Literal["chatglm", "chatglm2", "chatglm3", "glm4"]

# As published; ChatGLM2's and ChatGLM3's folders name the first. The other two are what we write.
_CLASSES = ("ChatGLMTokenizer", "ChatGLM4Tokenizer", "ChatGLM2Tokenizer", "ChatGLM3Tokenizer")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# CodeGeeX2 is a ChatGLM2.
_NAME = re.compile(r"(?:chatglm|codegeex)[-_]?([23])(?!\d)", re.IGNORECASE)
_CHATGLM2_CONTEXT = 32768


def kind_of(folder: Path) -> Kind | None:
    """Tell which tokenizer `folder` holds; None when it is fast already, or not one of these.

    Raises:
        SourceError: a JSON file in the folder is damaged.
    """
    vocabulary = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists():
        return None
    if not vocabulary.is_file():
        return "chatglm" if (folder / "ice_text.model").is_file() else None
    tokenizer = optional_json(folder / "tokenizer_config.json")
    model = optional_json(folder / "config.json")
    name = tokenizer.get("tokenizer_class")
    if name not in _CLASSES and not (name is None and model.get("model_type") == "chatglm"):
        return None
    with vocabulary.open("rb") as file:
        head = file.read(256)
    if name == "ChatGLM4Tokenizer" or _TIKTOKEN_LINE.match(head):
        return "glm4"
    if name == "ChatGLM2Tokenizer":
        return "chatglm2"
    if name == "ChatGLM3Tokenizer":
        return "chatglm3"
    return (
        _from_code(folder)
        or _from_tokens(tokenizer)
        or _from_names(tokenizer)
        or _from_names(model)
        or _from_dimensions(model)
    )


def _from_code(folder: Path) -> Kind | None:
    for pattern in ("tokenization*.py", "modeling*.py"):
        for path in sorted(folder.glob(pattern)):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "<|user|>" in text:
                return "chatglm3"
            if "[gMASK]" in text or "build_prompt" in text:
                return "chatglm2"
    return None


def _from_tokens(tokenizer: Json) -> Kind | None:
    tokens = json.dumps(tokenizer.get("added_tokens_decoder", {}))
    template = str(tokenizer.get("chat_template") or "")
    if "<|user|>" in tokens or "<|" in template:
        return "chatglm3"
    return "chatglm2" if "[Round" in template else None


def _from_names(config: Json) -> Kind | None:
    for key in ("name_or_path", "_name_or_path"):
        found = _NAME.search(str(config.get(key, "")))
        if found:
            return "chatglm2" if found[1] == "2" else "chatglm3"
    return None


def _from_dimensions(model: Json) -> Kind:
    second = model.get("seq_length") == _CHATGLM2_CONTEXT and "rope_ratio" not in model
    return "chatglm2" if second else "chatglm3"
