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
from concurrent.futures import Future, ThreadPoolExecutor
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
from .gptq_layers import GptqModel
from .llama_cpp import LlamaCpp
from .vllm_cpu import VllmCpu

AnyEngine = Engine | GptqModel
ENGINES: tuple[AnyEngine, ...] = (LlamaCpp(), VllmCpu(), GptqModel())
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
    ready: list[AnyEngine] = []
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


def _prepare(engine: AnyEngine) -> str | None:
    """Make an engine ready, or say why it cannot be."""
    try:
        reason = engine.missing()
        if reason is None:
            engine.environment.ensure(_say)
    except EnvironmentFailed as error:
        return str(error)
    return reason


def _run(engines: Sequence[AnyEngine], work: Path, wanted: Sequence[str]) -> Iterator[Row]:
    def asked(name: str) -> bool:
        return any(part in name for part in wanted)

    source = work / "source"
    _say("building the model (SmolLM2-135M-Instruct as a ChatGLM3 checkpoint)")
    checkpoints.build_source(source)
    tries = [
        (engine, checkpoint, work / f"checkpoint-{number}")
        for engine in engines
        if not isinstance(engine, GptqModel)
        for number, checkpoint in enumerate(engine.checkpoints)
        if asked(checkpoint.name)
    ]
    # An engine computes in one thread. While it does, the judge reads what the one before it said.
    with ThreadPoolExecutor(1) as ahead:
        answers = [ahead.submit(_answer, *one, source, work) for one in tries[:1]]
        for number, one in enumerate(tries):
            following = tries[number + 1 : number + 2]
            answered, answers = answers[0], [ahead.submit(_answer, *it, source, work) for it in following]
            yield from _say_each(_judge(*one, answered, source))
    for engine in engines:
        if isinstance(engine, VllmCpu) and asked(SERVED):
            yield from _say_each(_serve(engine, source, work))
        elif isinstance(engine, GptqModel):
            chosen = [checkpoint for checkpoint in engine.checkpoints if asked(checkpoint.name)]
            yield from _say_each(_read(engine, chosen, source, work))


def _say_each(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        _say(f"{row.engine}, {row.checkpoint}, {row.compared}: {row.result}; {row.seconds:.0f} s")
        yield row


def _answer(
    engine: Engine, checkpoint: Checkpoint, out: Path, source: Path, work: Path
) -> tuple[Answer, float]:
    """Convert and have the engine run it; returns what it said, and seconds."""
    begin = time.monotonic()
    how = "a recipe in Python" if checkpoint.recipe else " ".join(checkpoint.options)
    _say(f"{engine.name}, {checkpoint.name}: {f'glmquant convert {how}'.rstrip()}")
    checkpoints.convert(source, out, checkpoint)
    answer = engine.answer(checkpoint, out, checkpoints.prompt_ids(source), work)
    return answer, time.monotonic() - begin


def _judge(
    engine: Engine, checkpoint: Checkpoint, out: Path, answered: Future[tuple[Answer, float]], source: Path
) -> Iterator[Row]:
    """Rows for a checkpoint, and for a judge with damaged weights."""
    seconds = 0.0

    def row(compared: str, faults: Sequence[str], figures: object) -> Row:
        return _row(engine, checkpoint.name, compared, faults, figures, seconds)

    try:
        answer, seconds = answered.result()
        begin = time.monotonic()
        judge = reference.Judge(out, answer, checkpoint.activations)
        verdict = judge.verdict()
        faults = [*_otherwise(checkpoint, source, out, answer), *verdict.faults]
        seconds += time.monotonic() - begin
        yield row(", ".join([answer.architecture, answer.dtype, *answer.kernels]), faults, verdict)
        begin = time.monotonic()
        damaged = judge.verdict(checkpoint.damage)
        seconds = time.monotonic() - begin
        unnoticed = [] if damaged.faults else ["the comparison did not notice"]
        yield row(f"control: {checkpoint.damage.__name__.replace('_', ' ')}", unnoticed, damaged)
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        yield row("-", [str(error)], "nothing to compare")
    finally:
        rmtree(out, ignore_errors=True)


def _serve(engine: VllmCpu, source: Path, work: Path) -> Iterator[Row]:
    """A row for ``vllm serve``, with a group size that two GPUs would admit."""
    out, begin = work / "checkpoint", time.monotonic()
    _say(f"{engine.name}, {SERVED}: glmquant convert --group-size 64")
    try:
        checkpoints.convert(source, out, Checkpoint(SERVED, ("--group-size", "64"), "auto", "-"))
        faults, figures = served.compare(out, engine.environment, checkpoints.prompt_ids(source), work)
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        faults, figures = [str(error)], "nothing to compare"
    finally:
        rmtree(out, ignore_errors=True)
    yield _row(engine, SERVED, "vllm serve, glmquant.load", faults, figures, time.monotonic() - begin)


def _read(engine: GptqModel, chosen: Sequence[Checkpoint], source: Path, work: Path) -> Iterator[Row]:
    """Rows for layers that are read and not run."""
    begin = time.monotonic()
    try:
        for name, faults, figures in engine.compare(chosen, source, work):
            yield _row(
                engine, name, "TorchLinear.dequantize_weight", faults, figures, time.monotonic() - begin
            )
            begin = time.monotonic()
    except (ConversionFailed, EngineFailed, GlmquantError) as error:
        yield _row(engine, "-", "-", [str(error)], "nothing to compare", time.monotonic() - begin)


def _row(
    engine: AnyEngine, name: str, compared: str, faults: Sequence[str], figures: object, seconds: float
) -> Row:
    result = f"{'; '.join(['FAILED', *faults]) if faults else 'ok'} ({figures})"
    return Row(engine.name, engine.environment.version(), name, compared, result, not faults, seconds)


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
