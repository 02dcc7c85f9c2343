"""Let real engines run what ``convert`` writes, and print one table.

    python -m tests.engines [--only vllm] [--allow-missing]

Ends with status 1 if an engine refuses a checkpoint, runs it otherwise than glmquant reads it, keeps it in memory
otherwise than it is stored, or cannot be had here (``--allow-missing`` forgives only the last).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from filelock import FileLock

from glmquant import GlmquantError
from glmquant.checkpoint.source import open_folder

from . import checkpoints, reference, served
from .base import Answer, Engine, EngineFailed
from .checkpoints import Checkpoint, ConversionFailed
from .environments import EnvironmentFailed, cache
from .llama_cpp import LlamaCpp
from .vllm_cpu import VllmCpu

ENGINES: tuple[Engine, ...] = (LlamaCpp(), VllmCpu())
_START = time.monotonic()


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    engine: str
    version: str
    checkpoint: str
    compared: str
    result: str
    passed: bool


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=[engine.name for engine in ENGINES], help="one engine")
    parser.add_argument(
        "--allow-missing", action="store_true", help="an engine that cannot be had is no failure"
    )
    options = parser.parse_args()
    rows: list[Row] = []
    ready: list[Engine] = []
    for engine in ENGINES:
        if options.only in (None, engine.name):
            reason = _prepare(engine)
            if reason is None:
                ready.append(engine)
            else:
                rows.append(Row(engine.name, "-", "-", "-", f"not run: {reason}", options.allow_missing))
    if ready:
        cache().mkdir(parents=True, exist_ok=True)
        work = cache() / "run"
        with FileLock(cache() / ".run.lock"):  # one at a time: a run takes two cores and three gigabytes
            rmtree(work, ignore_errors=True)  # of a run that was killed
            work.mkdir()
            try:
                rows += _run(ready, work)
            finally:
                rmtree(work, ignore_errors=True)
    _print(rows)
    failed = sum(not row.passed for row in rows)
    _say(f"{failed} of {len(rows)} failed" if failed else "nothing failed")
    return 1 if failed else 0


def _prepare(engine: Engine) -> str | None:
    """Make an engine ready, or say why it cannot be."""
    try:
        reason = engine.missing()
        if reason is None:
            engine.environment.ensure(_say)
    except EnvironmentFailed as error:
        return str(error)
    return reason


def _run(engines: Sequence[Engine], work: Path) -> Iterator[Row]:
    source = work / "source"
    _say("building the model (SmolLM2-135M-Instruct as a ChatGLM3 checkpoint)")
    checkpoints.build_source(source)
    for engine in engines:
        version = engine.environment.version()
        for checkpoint in engine.checkpoints:
            how = "a recipe in Python" if checkpoint.recipe else " ".join(checkpoint.options)
            command = f"glmquant convert {how}".rstrip()
            _say(f"{engine.name} {version}, {checkpoint.name}: {command}")
            for row in _try(engine, checkpoint, source, work):
                _say(f"  {row.compared}: {row.result}")
                yield row
        if isinstance(engine, VllmCpu):
            _say(f"{engine.name} {version}, served over HTTP")
            row = _serve(engine, source, work)
            _say(f"  {row.compared}: {row.result}")
            yield row


def _try(engine: Engine, checkpoint: Checkpoint, source: Path, work: Path) -> Iterator[Row]:
    """Rows for a checkpoint, and for a judge with damaged weights."""
    out = work / "checkpoint"

    def row(compared: str, faults: Sequence[str], figures: object) -> Row:
        result = f"{'; '.join(['FAILED', *faults]) if faults else 'ok'} ({figures})"
        return Row(engine.name, engine.environment.version(), checkpoint.name, compared, result, not faults)

    try:
        checkpoints.convert(source, out, checkpoint)
        answer = engine.answer(checkpoint, out, checkpoints.prompt_ids(source), work)
        verdict = reference.judge(out, answer, dynamic=checkpoint.dynamic)
        how = ", ".join([answer.architecture, answer.dtype, *answer.kernels])
        yield row(how, [*_otherwise(checkpoint, source, out, answer), *verdict.faults], verdict)
        if checkpoint.damage is not None:
            damaged = reference.judge(out, answer, checkpoint.damage, dynamic=checkpoint.dynamic)
            unnoticed = [] if damaged.faults else ["the comparison did not notice"]
            what = checkpoint.damage.__name__.replace("_", " ")
            yield row(f"control: {what}", unnoticed, damaged)
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        yield row("-", [str(error)], "nothing to compare")
    finally:
        rmtree(out, ignore_errors=True)


def _serve(engine: VllmCpu, source: Path, work: Path) -> Row:
    """A row for ``vllm serve``, with a group size that two GPUs would admit."""
    out = work / "checkpoint"
    try:
        checkpoints.convert(source, out, ("--group-size", "64"))
        faults, figures = served.compare(out, engine.environment, checkpoints.prompt_ids(source), work)
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        faults, figures = [str(error)], "nothing to compare"
    finally:
        rmtree(out, ignore_errors=True)
    result = f"{'; '.join(['FAILED', *faults]) if faults else 'ok'} ({figures})"
    version = engine.environment.version()
    return Row(engine.name, version, "INT4 group 64", "vllm serve, glmquant.load", result, not faults)


def _otherwise(checkpoint: Checkpoint, source: Path, out: Path, answer: Answer) -> list[str]:
    """What the checkpoint is, the engine ran it as, or keeps in memory, otherwise than expected."""
    faults = []
    packed, drift = reference.packed_bytes(out), reference.drift(source, out)
    shards = len(open_folder(out).files)
    lengths = {len(text.tokens) for text in answer.continuations}
    if answer.architecture != checkpoint.architecture:
        faults.append(f"run as {answer.architecture}, not {checkpoint.architecture}")
    if answer.packed_bytes is not None and (
        answer.packed_bytes != packed or bool(answer.kernels) != bool(packed)
    ):
        faults.append(
            f"{answer.packed_bytes} bytes of packed weights in memory, {packed} on disk, kernels {answer.kernels}"
        )
    if len(answer.continuations) != len(checkpoints.PROMPTS) or lengths != {checkpoints.NEW_TOKENS}:
        faults.append("not a text of the length asked for to every prompt")
    if shards < checkpoint.shards:
        faults.append(f"{shards} files of weights, at least {checkpoint.shards} were to be tried")
    if not drift <= checkpoint.drift:
        faults.append(f"a weight is {drift:.3f} off its source ({checkpoint.drift} is allowed)")
    return faults


def _print(rows: Sequence[Row]) -> None:
    head = ("engine", "version", "checkpoint", "compared", "result")
    cells = [head, *((r.engine, r.version, r.checkpoint, r.compared, r.result) for r in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(head) - 1)]
    cells.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3], "------"))
    print()
    for line in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))
    print(
        "\nclear: tokens that rounding cannot change; gap: how far a token's logit is from the best, at most;\n"
        "error: mean difference of log-probabilities; 'of': what rounding explains. A control must exceed it."
    )


def _say(text: str) -> None:
    print(f"{time.monotonic() - _START:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
