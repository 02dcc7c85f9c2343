"""What a model reads while it is calibrated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._windows import CALIBRATION_SAMPLE, cut, read_text
from ..recipe import RANDOM, Calibration
from ..tokenizers.loading import load_tokenizer

_TEXT_PER_RANDOM = 3  # windows


@dataclass(frozen=True)
class CalibrationText:
    """Windows [windows, tokens] of a text, what a report says of them, and torch's threads before a conversion, which
    lowers their number.
    """

    ids: Tensor
    summary: Mapping[str, Any]
    threads: int


def calibration_text(calibration: Calibration, folder: Path, context: int) -> CalibrationText:
    """Windows spread evenly over the text, as the tokenizer of the model in `folder` cuts it, and random tokens.

    No text shows all that a model may be given. One window in four is of tokens drawn evenly from the whole vocabulary:
    what they move is not to be thrown away for the sake of the text. On text of another kind this takes a third off the
    damage, on text of the same kind it costs nothing. Random tokens alone, without any text, do better than any method
    that looks at weights only.

    Args:
        calibration: what is asked for.
        folder: holds the tokenizer.
        context: of the model; no window is longer.

    Raises:
        SourceError: the text cannot be read.
        UsageError: it is shorter than a window.
    """
    calibration = replace(calibration, window=min(calibration.window, context))
    alone = calibration.text == RANDOM
    text = "" if alone else read_text(calibration.text, sample=CALIBRATION_SAMPLE)
    tokenizer = load_tokenizer(folder)
    prefix = list(tokenizer.encode("", add_special_tokens=True))
    chosen = torch.empty(0, calibration.window, dtype=torch.int64)
    if not alone:
        ids = cut(text, tokenizer, calibration.window).ids
        count = min(calibration.windows, len(ids))
        chosen = ids[[number * len(ids) // count for number in range(count)]]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    size = (calibration.windows if alone else -(-len(chosen) // _TEXT_PER_RANDOM), calibration.window)
    drawn = plain[torch.randint(len(plain), size, generator=torch.Generator().manual_seed(0))]
    drawn[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    name = CALIBRATION_SAMPLE if calibration.text is None else Path(calibration.text).name
    summary = {
        "text": name,
        **({} if alone else {"sha256": hashlib.sha256(text.encode()).hexdigest()}),
        "windows": len(chosen),
        "random_windows": len(drawn),
        "window": calibration.window,
    }
    return CalibrationText(torch.cat([chosen, drawn]), summary, torch.get_num_threads())
