"""What the user asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .errors import UsageError

Group = int | Literal["row"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes from ``4GB`` (decimal), ``4GiB`` (binary), or a plain number of them, of a MiB at least.

    Raises:
        UsageError: not a size, not positive, or a small number without a unit, where GiB will have been meant.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write for example 4GB, 3.5GiB or 500MB.")
    try:
        size = int(float(match[1]) * _UNITS[match[2]])
    except OverflowError:
        raise UsageError(f"{text[:20]}... is more than any disk holds.") from None
    if not match[2] and 0 < float(match[1]) < 2**20:
        raise UsageError(f"{text!r} would be {size} bytes; write {match[1]}GiB (or {match[1]}GB).")
    if size <= 0:
        raise UsageError(f"the size {text!r} must be positive.")
    return size


def show_size(nbytes: int) -> str:
    """Bytes as GiB, or as MiB where that would be 0.0 GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.2f} MiB"


def scheme_name(bits: int, group: Group | None) -> str:
    """A scheme for people, such as ``int4 g128``."""
    if bits == 16:
        return "16 bit"
    return f"int{bits} {group if group == 'row' else f'g{group}'}"


# Fields of a recipe that most recipes have no use for.
_OPTIONAL = ("fit", "gptq_version", "double_quant", "activations", "calibration", "k_quant")


@dataclass(frozen=True)
class Choice:
    """The scheme of source tensors that have to be alike.

    Args:
        name: for people.
        tensors: their names in the source; the one linear layer, or q, k and v of an attention.
        bits: 4, 8, or 16 for "as it is".
        group_size: columns that share a scale, ``"row"``; None with 16 bits.
        reason: why it is so, for people.
    """

    name: str
    tensors: tuple[str, ...]
    bits: int
    group_size: Group | None
    reason: str = ""

    def __str__(self) -> str:
        return scheme_name(self.bits, self.group_size)


@dataclass(frozen=True)
class Fit:
    """A budget, and the schemes that were chosen to stay within it.

    Args:
        budget: bytes that a process may take at its peak.
        context: tokens of prompt and answer.
        batch: sequences at a time.
        predicted: the peak that the choices lead to, in bytes; 0 before they are made.
        choices: for every linear layer; empty before they are made.
        unused: options that were given and are of no use, as all layers stay in 16 bit.
    """

    budget: int
    context: int
    batch: int = 1
    predicted: int = 0
    choices: tuple[Choice, ...] = ()
    unused: tuple[str, ...] = ()

    def notes(self) -> Iterator[str]:
        """What was asked for and is not done, as sentences."""
        if self.unused:
            yield f"everything fits in 16 bit, so nothing is quantized; not used: {', '.join(self.unused)}."

    def summary(self) -> str:
        """What was chosen how often, and what it leads to, for people."""
        counts = Counter(str(choice) for choice in self.choices)
        schemes = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
        sizes = f"{self.predicted / 2**30:.2f} of {self.budget / 2**30:.2f} GiB"
        return f"{sizes} with {self.batch} x {self.context} tokens ({schemes})"

    def of(self, tensor: str) -> Choice | None:
        """The choice for a source tensor; None if it is not a linear layer."""
        return self._by_tensor.get(tensor)

    @cached_property
    def _by_tensor(self) -> dict[str, Choice]:
        return {name: choice for choice in self.choices for name in choice.tensors}


SCALED = ("awq", "awq-gptq")
"""Methods that scale channels first, and fold that into what computes them."""
CALIBRATED = ("gptq", "weighted-mse", *SCALED)
"""Methods that look at what text does to the inputs of layers."""
METHODS = ("rtn", "mse", "hqq", "thudm", *CALIBRATED)
"""What `Recipe.method` may be asked to be; bitsandbytes' own goes without saying."""
RANDOM = "random"
"""In place of a text to calibrate with: tokens drawn evenly from the vocabulary."""


@dataclass(frozen=True)
class Calibration:
    """The text that a calibrated method looks at.

    Args:
        text: UTF-8 file; None is a bundled sample, English and Chinese; `RANDOM` is no text at all, but random tokens.
        windows: how many pieces of it, spread evenly.
        window: tokens in each.
    """

    text: str | None = None
    windows: int = 64
    window: int = 512

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window < 1:
            raise UsageError("calibration needs at least one window of one token.")

    def __str__(self) -> str:
        text = "the bundled sample" if self.text is None else Path(self.text).name
        return f"calibrated on {'random tokens, no text' if self.text == RANDOM else text}"


@dataclass(frozen=True)
class Recipe:
    """What a conversion should do; None leaves the choice to the format (see `glmquant.formats`).

    Args:
        bits: 4, 8, or 16 for a change of layout only.
        group_size: columns that share a scale, or ``"row"``.
        symmetric: no zero points.
        method: see `glmquant.quantizers`.
        format: ``compressed-tensors``, ``cpm``, ``gptq``, ... (see `glmquant.formats`).
        layout: ``native`` (transformers' names, no remote code) or ``original`` (THUDM's names).
        quantize_head: the output head in 8 bit instead of 16.
        quantize_embeddings: the input embeddings in 8 bit instead of 16; in ``cpm``, for ChatGLM-6B only, embedding
            and head at `bits`.
        fit: chooses bits and groups per layer under a budget, in place of `bits` and `group_size`.
        gptq_version: of GPTQ's checkpoint format, 1 or 2; for ``gptq`` only.
        double_quant: bitsandbytes' nf4 with its scales quantized too.
        activations: 8 for W8A8: engines round activations to 8 bits too, token by token.
        k_quant: of ``gguf`` with 16 bits: the type, such as ``q4_k_m``, into which llama.cpp's own ``llama-quantize``
            turns the file.
        calibration: for the methods in `CALIBRATED`; None is the bundled sample.
        max_shard_size: upper limit of a file in bytes (a single tensor may exceed it).
    """

    bits: int = 4
    group_size: Group | None = None
    symmetric: bool = True
    method: str | None = None
    format: str | None = None
    layout: str | None = None
    quantize_head: bool = False
    quantize_embeddings: bool = False
    max_shard_size: int = 4 * 10**9
    gptq_version: int | None = None
    double_quant: bool = False
    activations: int | None = None
    k_quant: str | None = None
    fit: Fit | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise UsageError(f"--bits {self.bits} is not supported; use 4, 8 or 16.")
        if self.max_shard_size <= 0:
            raise UsageError("the shard size must be positive.")
        if self.layout not in (None, "native", "original"):
            raise UsageError(f"layout {self.layout!r} is not known; use native or original.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what belongs to one format or budget is there where it was asked for."""
        values = asdict(self)
        if self.calibration is not None and self.calibration.text is not None:
            values["calibration"]["text"] = Path(self.calibration.text).name  # not where it lies
        return {
            key: value for key, value in values.items() if key not in _OPTIONAL or value not in (None, False)
        }
