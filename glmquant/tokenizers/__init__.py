"""Tokenizers: THUDM's own, exact, for original folders; fast ones, as data, for converted folders.

`load_tokenizer` gives the one that a folder has. ChatGLMTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer
and ChatGLM4Tokenizer do what THUDM's Python code did, without that code.

ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B-chat come with a vocabulary (``tokenizer.model``) and Python
code that must be run to use it. `fast_tokenizer_files` turns the vocabulary into a
``tokenizer.json`` and the code's prompt format into a chat template, so that
``AutoTokenizer.from_pretrained(folder)`` gives the same ids without any code from the folder.

Two things differ, because a fast tokenizer looks for special tokens in whatever text it is given:

* In a plain string, text that spells a special token (``<|user|>``, ``</s>``, for ChatGLM2 and 3
  also ``sop`` as a word) becomes that token. With ``split_special_tokens=True`` it stays text, as
  in THUDM's code for ChatGLM2 and 3 (THUDM's code for GLM-4 makes it a token too). In a
  conversation, the templates for ChatGLM2 and 3 guard what messages say, so that no message can
  forge a token; GLM-4's template is carried as published, which does not guard.
* The ChatGLM2 and 3 tokenizers drop U+FDD0, which Unicode reserves for a program's own use: their
  templates guard text with it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kind import Kind, kind_of

if TYPE_CHECKING:
    from .loading import load_tokenizer
    from .original_chatglm import ChatGLMTokenizer
    from .original_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
    from .original_glm4 import ChatGLM4Tokenizer

__all__ = [
    "ChatGLM2Tokenizer", "ChatGLM3Tokenizer", "ChatGLM4Tokenizer", "ChatGLMTokenizer", "Kind",
    "fast_tokenizer_files", "kind_of", "load_tokenizer",
]  # fmt: skip

# Looked up when first used: the classes need transformers, whose import takes seconds.
_HOMES = {
    "load_tokenizer": "loading", "ChatGLMTokenizer": "original_chatglm", "ChatGLM2Tokenizer": "original_chatglm2",
    "ChatGLM3Tokenizer": "original_chatglm2", "ChatGLM4Tokenizer": "original_glm4",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def fast_tokenizer_files(folder: Path) -> dict[str, bytes] | None:
    """Make the fast tokenizer for the THUDM tokenizer in `folder`: file name -> contents.

    Nothing in `folder` is executed, and the same input gives the same bytes.

    Args:
        folder: a model folder; ``tokenizer.model``, ``tokenizer_config.json`` and ``config.json``
            are read, and Python files as text (see `kind_of`).

    Returns:
        ``tokenizer.json``, ``tokenizer_config.json`` and, where the model has a prompt format,
        ``chat_template.jinja``. None when there is nothing to do: the folder has a
        ``tokenizer.json`` already, or its tokenizer is none of ChatGLM2's, ChatGLM3's and GLM-4's
        (ChatGLM-6B's stays with SentencePiece, which normalizes text in ways of its own).

    Raises:
        SourceError: a file is damaged, or is not the vocabulary that the folder says it is.
    """
    kind = kind_of(folder)
    if kind is None or kind == "chatglm":
        return None
    if kind == "glm4":
        from .glm4 import glm4_files

        return glm4_files(folder)
    from .chatglm import chatglm_files

    return chatglm_files(folder, kind)
