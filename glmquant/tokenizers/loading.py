"""`load_tokenizer`: from a folder to the tokenizer that belongs to it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hub
from ..errors import SourceError
from .common import optional_json
from .kind import kind_of

if TYPE_CHECKING:
    from .original import OriginalTokenizer

# Rows of the embedding in the published checkpoints, and entries of the vocabulary that belongs to them.
_PUBLISHED = {"chatglm": (130528, 130344), "chatglm2": (65024, 64789), "glm4": (151552, 151329)}
_PUBLISHED["chatglm3"] = _PUBLISHED["chatglm2"]


def load_tokenizer(folder: str | PathLike[str], **options: Any) -> Any:
    """Load the tokenizer of a model folder, original or converted. No code of the folder is run.

    Args:
        folder: a folder with ``tokenizer.json`` (what ``convert`` writes in the native layout), or with the
            vocabulary of one of THUDM's tokenizers: ``ice_text.model`` or ``tokenizer.model``.
        options: passed to the tokenizer.

    Returns:
        A ChatGLMTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer or ChatGLM4Tokenizer, exact to the
        published one; for ``tokenizer.json`` transformers' PreTrainedTokenizerFast.

    Raises:
        SourceError: a file is missing or damaged, or the vocabulary is not the model's.
    """
    path = model_folder(folder)
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True, **options)
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise SourceError(
                f"{path / 'tokenizer.json'} cannot be loaded ({error}); copy the tokenizer's files again."
            ) from error
        check_rows(tokenizer, path)
        return tokenizer
    return class_for(path).from_pretrained(path, **options)


def model_folder(folder: str | PathLike[str]) -> Path:
    """The folder as a path.

    Raises:
        SourceError: it is not a folder on this machine.
    """
    return hub.local_folder(folder)


def class_for(folder: Path) -> type[OriginalTokenizer]:
    """The class for THUDM's tokenizer in `folder`.

    Raises:
        SourceError: there is none, or a file is damaged.
    """
    kind = kind_of(folder)
    if kind == "chatglm":
        from .original_chatglm import ChatGLMTokenizer

        return ChatGLMTokenizer
    if kind == "glm4":
        from .original_glm4 import ChatGLM4Tokenizer

        return ChatGLM4Tokenizer
    if kind is not None:
        from .original_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer

        return ChatGLM2Tokenizer if kind == "chatglm2" else ChatGLM3Tokenizer
    why = "none of these files is there"
    if (folder / "tokenizer.model").is_file():
        stated = optional_json(folder / "tokenizer_config.json").get("tokenizer_class")
        why = f"there is a tokenizer.model, but tokenizer_class is {stated!r}"
    raise SourceError(
        f"{folder} has no tokenizer that is known here: it takes tokenizer.json, ChatGLM-6B's ice_text.model, or the "
        f"tokenizer.model and tokenizer_config.json of ChatGLM2, ChatGLM3 or GLM-4-9B-chat ({why})."
    )


def check_rows(tokenizer: Any, folder: Path) -> None:
    """Compare the size of a vocabulary with the rows of the embedding that ``config.json`` states.

    Raises:
        SourceError: they cannot belong together.
    """
    config = optional_json(folder / "config.json")
    rows = config.get("padded_vocab_size", config.get("vocab_size"))
    if not isinstance(rows, int):
        return
    if len(tokenizer) > rows:
        raise SourceError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but config.json gives the model only {rows} rows; "
            "take the tokenizer files and config.json from one model."
        )
    published, entries = _PUBLISHED.get(getattr(tokenizer, "kind", ""), (0, 0))
    # Tokens of a fine-tune come on top of these; fewer are another vocabulary.
    if rows == published and len(tokenizer) < entries:
        raise SourceError(
            f"the vocabulary in {folder} has {len(tokenizer)} tokens, but a model with {rows} rows has at least "
            f"{entries}; take the file that was published with the model."
        )
