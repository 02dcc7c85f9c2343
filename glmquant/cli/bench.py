"""``glmquant bench``: how fast checkpoints run, and in how much memory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import SourceError, UsageError
from .terminal import json_option, progress_bar

# Names only: the runtimes themselves import torch. A test compares.
PEERS = ("16bit", "dequantize", "bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8")


def _counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.BadParameter("use whole numbers from 1 on with commas between them, such as 1,4,16")
    return counts


@click.command("bench")
@click.argument("outs", nargs=-1, required=True, metavar="OUT...")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(PEERS),
    help="Also run the weights of the first OUT so; may be repeated.",
)
@click.option(
    "--prompt", type=click.IntRange(3), default=256, show_default=True, help="Tokens of the prompt."
)
@click.option("--new", type=click.IntRange(2), default=64, show_default=True, help="Tokens after it.")
@click.option("--batch", callback=_counts, default="1", show_default=True, help="Sequences at once: 1,4,16")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Runs not counted.")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Runs that are.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Default: as config.json says."
)
@click.option(
    "--markdown", type=click.Path(dir_okay=False), metavar="FILE", help="Write the table there too."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Memory against speed, and by term: out.png",
)
@json_option
def bench(
    outs: tuple[str, ...],
    peers: tuple[str, ...],
    prompt: int,
    new: int,
    batch: tuple[int, ...],
    warmup: int,
    repetitions: int,
    device: str,
    dtype: str | None,
    markdown: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Measure how fast the models OUT... run, each in a process of its own.

    \b
    glmquant bench chatglm3-6b-int4                              load time, memory, tokens per second
    glmquant bench chatglm3-6b-int4 chatglm3-6b --batch 1,4      several, side by side
    glmquant bench chatglm3-6b-int4 --peer 16bit --peer dequantize --dtype bfloat16
    glmquant bench chatglm3-6b-int4 chatglm3-6b-q4_0.gguf --plot bench.png

    Peers multiply the same weights in another way: 16bit unpacks them when it loads, dequantize at every call, as
    THUDM's code does; bitsandbytes and torchao quantize them once more in their own way. An OUT that is a GGUF file, or
    a folder with one, runs in llama.cpp (pip install xllamacpp). What fails is a row that says why; exit status 1 if
    nothing ran. Beside the memory that was measured stands what check and recipes predict, for the largest batch.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    from .. import hub
    from ..bench import harness, report
    from ..bench.cases import Candidate, Workload
    from ..bench.llama_cpp import gguf_file

    for target in (markdown, plot):
        if target is not None and not Path(target).expanduser().absolute().parent.is_dir():
            raise UsageError(f"{target} cannot be written, since its folder does not exist.")
    for out in outs:
        if gguf_file(out) is None and not (hub.local_folder(out) / "config.json").is_file():
            raise SourceError(f"{out} is no model: it holds no config.json.")
    workload = Workload(prompt, new, batch, warmup, repetitions)
    candidates = [
        Candidate(out, "llama.cpp" if gguf_file(out) else "glmquant", device, dtype) for out in outs
    ]
    candidates += [Candidate(outs[0], peer, device, dtype) for peer in peers]
    with progress_bar("measuring", quiet=as_json, unit="candidates") as shown:
        found = harness.run(candidates, workload, shown)
    click.echo(json.dumps(found, indent=2) if as_json else report.text(found))
    if markdown is not None:
        Path(markdown).expanduser().write_text(report.markdown(found) + "\n", encoding="utf-8")
    if plot is not None:
        report.plot(found, Path(plot).expanduser())
    if all(result["error"] is not None for result in found["results"]):
        raise SystemExit(1)
