"""One real language model, the ways in which it is converted, and what it is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import glmquant
from benchmarks import standin
from glmquant import Fit, Recipe, UsageError, families
from glmquant.checkpoint.source import open_folder
from glmquant.formats.k_quants import llama_quantize
from glmquant.recipe import Choice

from .damage import Damage, pairs_swapped, zero_points_off

NEW_TOKENS = 32
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    "The",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman. Every morning, before the sun had "
    "risen, he would take his boat out",
    _CHAT.format("Name three primary colors."),
    _CHAT.format("Why is the sky blue? Answer in one sentence."),
    _CHAT.format("Write a short story about a dog who finds a map."),
)


class ConversionFailed(Exception):
    """``glmquant convert`` failed; the message is its own."""


@dataclass(frozen=True)
class Checkpoint:
    """A conversion to try on an engine.

    Attributes:
        name: for the table.
        options: of ``glmquant convert``.
        dtype: in which the engine shall compute; ``auto`` leaves it to the engine, as users do.
        architecture: the engine's class that must have run it.
        drift: the largest relative error of a weight; 0.1 to 0.15 is usual for four bits, 1.4 is noise.
        shards: at least this many files of weights.
        damage: must be noticed if it is done to the reference; shows that the comparison can fail.
        activations: the engine rounds activations to 8 bits, with a scale for so many columns; 0: for a whole token.
        recipe: what to do with a source, where `options` cannot say it.
    """

    name: str
    options: tuple[str, ...]
    dtype: str
    architecture: str
    drift: float = 0.2
    shards: int = 1
    damage: Damage = pairs_swapped
    recipe: Callable[[Path], Recipe] | None = None
    activations: int | None = None


def for_vllm() -> tuple[Checkpoint, ...]:
    """What vLLM is given on a CPU.

    Sixteen bits run in float32, because then nothing but the order of sums may differ. vLLM has no float32 kernel for
    four bits, and none at all on CPUs for eight.
    """
    # vLLM runs a native `glm` through transformers' classes, and THUDM's names through a class of its own.
    native, original = "TransformersForCausalLM", "ChatGLMForCausalLM"
    gptq = ("--format", "gptq", "--gptq-version")
    rows = ("--group-size", "row", "--max-shard-size", "100MB")
    asymmetric = ("--group-size", "32", "--asymmetric")
    return (
        Checkpoint("16 bit", ("--bits", "16"), "float32", native, drift=0),
        Checkpoint("INT4 group 128", (), "auto", native),
        Checkpoint("INT4 group 32 asymmetric", asymmetric, "auto", native, damage=zero_points_off),
        Checkpoint("INT4 per row, in shards", rows, "auto", native, shards=3),
        Checkpoint("INT4 original layout", ("--layout", "original"), "auto", original),
        Checkpoint("INT4 in four groups, 16 bit", (), "auto", native, recipe=mixed),
        Checkpoint(
            "GPTQ INT4 group 64",
            ("--format", "gptq", "--group-size", "64"),
            "auto",
            native,
        ),
        Checkpoint("GPTQ v2 original layout", (*gptq, "2", "--layout", "original"), "auto", original),
        Checkpoint("W8A8", ("--bits", "w8a8"), "auto", native, activations=0),
    )


def for_llama_cpp() -> tuple[Checkpoint, ...]:
    """What llama.cpp is given. It keeps its cache in half and rounds what a quantized matrix is multiplied with to
    8 bits, in blocks of 32, or of 256 for K-quants, which are tried where there is a llama-quantize (in a width of
    1152 it falls back to blocks of 32, so activations are rounded now this way and now that).
    """
    plain = (
        Checkpoint("F16", ("--gguf-type", "f16"), "float16", "chatglm", drift=0),
        Checkpoint("Q4_0", ("--gguf-type", "q4_0"), "float16", "chatglm", activations=32),
        Checkpoint("Q4_1", ("--gguf-type", "q4_1"), "float16", "chatglm", activations=32),
        Checkpoint("Q8_0", ("--gguf-type", "q8_0"), "float16", "chatglm", activations=32),
    )
    try:
        llama_quantize("q4_k_m")
    except UsageError:
        return plain
    return (*plain, Checkpoint("Q4_K_M", ("--gguf-type", "q4_k_m"), "float16", "chatglm", activations=128))


def mixed(source: Path) -> Recipe:
    """Every scheme of 4 bit that ``--fit`` may choose, and 16 bit, by turns: what `Fit` says of each layer.

    A budget would bring 8 bit along, for which vLLM has no kernel on CPUs.
    """
    kinds = [(4, "row"), (4, 128), (4, 64), (4, 32), (16, None)]
    config = open_folder(source).config
    family = families.detect(config)
    choices = [
        Choice(unit.name, tuple(tensor.name for tensor in unit.tensors), *kinds[number % len(kinds)])
        for number, unit in enumerate(family.units(family.dims(config)))
    ]
    return Recipe(fit=Fit(2**40, 512, choices=tuple(choices)))


def build_source(folder: Path) -> None:
    """Write the model: wide, which every engine takes, and off the 4-bit grid on which its weights were published.

    Its biases are zero and the gains of its norms are all equal, so nobody would notice if some were lost or
    exchanged. Here they become random, within what still makes sentences.
    """
    standin.build(folder, standin.Recipe(variant="wide", basis_change=True))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith((".bias", "layernorm.weight")):
            # relative to a gain, absolute for a bias
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            tensors[name] = ((tensor if tensor.any() else 1) * noise + tensor).half()
    changed = file.with_suffix(".changed")  # the tensors may still be views of the file
    save_file(tensors, changed, metadata={"format": "pt"})
    changed.replace(file)


def prompt_ids(source: Path) -> list[list[int]]:
    """`PROMPTS` as token ids."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def convert(source: Path, out: Path, checkpoint: Checkpoint) -> None:
    """Run ``glmquant convert`` as a user would, or `glmquant.convert` for a recipe that only Python can state."""
    if checkpoint.recipe is not None:
        glmquant.convert(source, out, checkpoint.recipe(source))
        return
    options = checkpoint.options
    command = [sys.executable, "-m", "glmquant.cli", "convert", str(source), str(out), *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        *_, message = process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"]
        raise ConversionFailed(f"glmquant convert: {message}")
