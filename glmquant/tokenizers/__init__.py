"""Fast tokenizers for converted checkpoints: THUDM's tokenizer code as data for stock transformers.

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

from pathlib import Path

from .kind import Kind, kind_of

__all__ = ["Kind", "fast_tokenizer_files", "kind_of"]


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
    if kind is None:
        return None
    if kind == "glm4":
        from .glm4 import glm4_files

        return glm4_files(folder)
    from .chatglm import chatglm_files

    return chatglm_files(folder, kind)
