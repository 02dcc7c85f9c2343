"""Text for evaluation, as windows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._open import PathLike
from .errors import SourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = "wikitext-2-sample.txt"
"""The bundled text for evaluation; see glmquant/data/README.md."""
CALIBRATION_SAMPLE = "calibration-sample.txt"
"""And that for calibration, which shares no article with it."""


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length], and which of them are predicted.

    Attributes:
        ids: every window starts with the `prefix` special tokens that the tokenizer puts before a text.
        prefix: how many those are.
        stride: tokens of text between the starts of two windows.
        scored: a model is asked for the last so many tokens of each window; what is before them is context.
    """

    ids: Tensor
    prefix: int
    stride: int
    scored: int


def read_text(path: PathLike | None, second_half: bool = False, sample: str = SAMPLE) -> str:
    """A text file, or a bundled sample for None.

    Args:
        path: UTF-8.
        second_half: only what follows the middle, for a file whose first half has served for calibration.
        sample: which one.

    Raises:
        SourceError: it cannot be read, or holds no text.
    """
    if path is None:
        text = (resources.files("glmquant") / "data" / sample).read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SourceError(f"the text {path} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError as error:
            raise SourceError(
                f"the text {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv."
            ) from None
    return halves(text)[1] if second_half else text


def halves(text: str) -> tuple[str, str]:
    """The part of a text to calibrate on, and the part to evaluate on, which share no line.

    They meet where the first line begins from the middle on; at the middle, if none does.
    """
    middle = len(text) // 2
    line = text.find("\n", max(0, middle - 1), -1) + 1
    return text[: line or middle], text[line or middle :]


def cut(
    text: str, tokenizer: Any, window: int, stride: int | None = None, most: int | None = None
) -> Windows:
    """Cut a text into windows of the same length. What is left over at its end is not used.

    A window is what the tokenizer puts before every text (``[gMASK] <sop>`` for ChatGLM and GLM-4), then text. For
    ChatGLM-6B, whose prompts end with these tokens, the text is thereby what it answers, which is the only part it
    predicts from left to right.

    Windows that do not overlap are scored from their first token of text on (from the second, if nothing is put before
    it). Overlapping ones are scored in their last `stride` tokens.

    Args:
        text: taken as plain text; what spells a special token in it does not become one.
        tokenizer: of the models that are compared.
        window: tokens in a window, with those before the text.
        stride: tokens from the start of one window to that of the next; None is no overlap.
        most: use no more windows than this.

    Raises:
        UsageError: sizes that make no window.
    """
    import torch

    prefix = list(tokenizer.encode("", add_special_tokens=True))
    # slow tokenizers warn of texts that are longer than a prompt may be, which a window is not
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
    size = window - len(prefix)
    context = 0 if prefix else 1  # the first of all tokens is predicted from nothing
    if size <= context:
        raise UsageError(
            f"a window of {window} tokens has no room for text; give at least {4 + len(prefix)}."
        )
    step = size if stride is None else stride
    if not 1 <= step <= size:
        raise UsageError(
            f"a stride of {step} would leave out text or not move; with windows of {window} tokens, give 1 to {size}."
        )
    if most is not None and most < 1:
        raise UsageError(f"{most} windows are none; give 1 or more, or leave it out for the whole text.")
    if len(ids) < size:
        raise UsageError(
            f"the text has {len(ids)} tokens, and one window needs {size}; give a longer text or a smaller window."
        )
    starts = range(0, len(ids) - size + 1, step)[:most]
    rows = [prefix + ids[start : start + size] for start in starts]
    return Windows(torch.tensor(rows), len(prefix), step, min(step, size - context))
