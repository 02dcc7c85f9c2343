"""Let real engines run what ``convert`` writes, and print one table.

    python -m tests.engines [--only vllm] [--row W8A8] [--allow-missing]

Ends with status 1 if an engine refuses a checkpoint, runs it otherwise than glmquant reads it, keeps it in memory
otherwise than it is stored, or cannot be had here (``--allow-missing`` forgives only the last).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
SERVED = "INT4 group 64, served"
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
    seconds: float = 0.0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=[engine.name for engine in ENGINES], help="one engine")
    parser.add_argument(
        "--row",
        action="append",
        metavar="NAME",
        help="only checkpoints with NAME in their names; may be repeated",
    )
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
                rows += _run(ready, work, options.row or [""])
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


def _run(engines: Sequence[Engine], work: Path, wanted: Sequence[str]) -> Iterator[Row]:
    source = work / "source"
    _say("building the model (SmolLM2-135M-Instruct as a ChatGLM3 checkpoint)")
    checkpoints.build_source(source)
    for engine in engines:
        version = engine.environment.version()
        for checkpoint in engine.checkpoints:
            if any(name in checkpoint.name for name in wanted):
                how = "a recipe in Python" if checkpoint.recipe else " ".join(checkpoint.options)
                _say(f"{engine.name} {version}, {checkpoint.name}: {f'glmquant convert {how}'.rstrip()}")
                yield from _timed(_try(engine, checkpoint, source, work))
        if isinstance(engine, VllmCpu) and any(name in SERVED for name in wanted):
            _say(f"{engine.name} {version}, {SERVED}")
            yield from _timed(_serve(engine, source, work))


def _timed(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, each with the seconds it took, and said as it comes."""
    begin = time.monotonic()
    for row in rows:
        end = time.monotonic()
        _say(f"  {row.compared}: {row.result}, {end - begin:.0f} s")
        yield replace(row, seconds=end - begin)
        begin = end


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


def _serve(engine: VllmCpu, source: Path, work: Path) -> Iterator[Row]:
    """A row for ``vllm serve``, with a group size that two GPUs would admit."""
    out = work / "checkpoint"
    try:
        checkpoints.convert(source, out, Checkpoint(SERVED, ("--group-size", "64"), "auto", "-"))
        faults, figures = served.compare(out, engine.environment, checkpoints.prompt_ids(source), work)
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        faults, figures = [str(error)], "nothing to compare"
    finally:
        rmtree(out, ignore_errors=True)
    result = f"{'; '.join(['FAILED', *faults]) if faults else 'ok'} ({figures})"
    version = engine.environment.version()
    yield Row(engine.name, version, SERVED, "vllm serve, glmquant.load", result, not faults)


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
    head = ("engine", "version", "checkpoint", "seconds", "compared", "result")
    cells = [
        head,
        *((r.engine, r.version, r.checkpoint, f"{r.seconds:.0f}", r.compared, r.result) for r in rows),
    ]
    widths = [max(len(line[n]) for line in cells) for n in range(len(head) - 1)]
    cells.insert(1, (*("-" * width for width in widths), "------"))
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
