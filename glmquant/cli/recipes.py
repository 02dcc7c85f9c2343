"""``glmquant recipes``: every recipe for a source, and what it would take."""

from __future__ import annotations

import json
from typing import Any

import click

from ..errors import UsageError
from ..recipe import CALIBRATED, METHODS, parse_size, show_size
from .convert import calibration_of
from .hub import tell_which
from .terminal import endpoint_option, json_option, print_table, progress_bar

_RUNTIMES = ("glmquant", "transformers", "vllm", "llama.cpp")


@click.command()
@click.argument("ref")
@click.option("--context", default=8192, show_default=True, metavar="N", help="Tokens of prompt and answer.")
@click.option("--batch", default=1, show_default=True, metavar="N", help="Sequences at a time.")
@click.option("--vram", metavar="SIZE", help="What there is, such as 6GiB: says what fits, and how far.")
@click.option("--runtime", type=click.Choice(_RUNTIMES), help="Default: glmquant; with --tp, vllm.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--tp", type=click.IntRange(1), default=1, metavar="N", help="GPUs that share the model (vLLM)."
)
@click.option("--quantize-head", is_flag=True, help="With the output head in 8 bit.")
@click.option("--measure", is_flag=True, help="Read the weights too, for the column of errors.")
@click.option(
    "--method", type=click.Choice(METHODS), help="Of the formats that take it.  [default: each format's]"
)
@click.option(
    "--calibration",
    type=click.Path(),
    metavar="FILE",
    help=f"Text for --method {' and '.join(CALIBRATED)}, as in convert.",
)
@click.option("--calibration-windows", type=click.IntRange(1), metavar="N", help="As in convert.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="With --measure: write what convert --fit --measurement takes.",
)
@endpoint_option
@json_option
def recipes(
    ref: str,
    context: int,
    batch: int,
    vram: str | None,
    runtime: str | None,
    device: Any,
    tp: int,
    quantize_head: bool,
    measure: bool,
    method: str | None,
    calibration: str | None,
    calibration_windows: int | None,
    save: str | None,
    as_json: bool,
) -> None:
    """List the recipes for the checkpoint REF: each format, width and group, and the memory it needs.

    \b
    glmquant recipes chatglm3-6b --context 8192 --vram 6GiB
    glmquant recipes chatglm3-6b --context 2048 --batch 4 --device cpu
    glmquant recipes glm-4-9b-chat --runtime vllm --tp 4
    glmquant recipes chatglm3-6b --measure                          with the expected error of every recipe
    glmquant recipes chatglm3-6b --measure --method gptq --calibration text.txt --save measured.json

    Reads config.json and headers only, unless it is to --measure. File sizes are exact. The error is that of the output
    of linear layers, relative, from weights alone (or, with a calibrated --method, from what a text makes of their
    inputs); it is shown once it was measured, here or by convert --fit. Of W8A8, which rounds activations too, it is
    not known. K-quants, --double-quant and --quantize-embeddings are not listed.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    from .._recipes import recipes as run
    from ..memory import Workload

    budget = None if vram is None else parse_size(vram)
    runtime = runtime or ("vllm" if tp > 1 else "glmquant")
    text = calibration_of(calibration, calibration_windows)
    if save is not None and not measure:
        raise UsageError("--save FILE is for what --measure finds; give that too.")
    tell_which(ref)
    with progress_bar("measuring", quiet=as_json or not measure, unit="layers") as measuring:
        found = run(
            ref, Workload(context, batch), budget=budget, runtime=runtime, device=device, tp=tp,
            quantize_head=quantize_head, method=method, calibration=text, measure=measure, measuring=measuring,
        )  # fmt: skip
    if save is not None:
        from .._sensitivity import measure as kept

        kept(ref, method or "mse", calibration=text).save(save)
    if as_json:
        asked = {
            "context": context,
            "batch": batch,
            "vram": budget,
            "runtime": runtime,
            "device": device,
            "tp": tp,
        }
        return click.echo(json.dumps({**asked, "recipes": [row.to_json() for row in found]}, indent=2))
    memory_name = "RAM" if device == "cpu" else "VRAM"
    head: tuple[str, ...] = ("recipe", "files", "bits", "error", "loading", memory_name)
    head += ("fits", "longest context") if budget else ()
    rows: list[tuple[str, ...]] = []
    for row in found:
        error = f"{row.error:.4f}" if row.error is not None else "-"
        cells: tuple[str, ...] = (row.name, show_size(row.file_bytes), f"{row.bits_per_weight:.2f}", error)
        if row.memory is None:
            cells += ("-", "-")
        else:
            cells += (show_size(row.memory.load_peak), show_size(row.memory.process))
        if budget:
            cells += ("-" if row.fits is None else "yes" if row.fits else "no",)
            cells += (f"{row.longest or '-'}",)
        rows.append(cells)
    share = f" on each of {tp} GPUs" if tp > 1 else ""
    within = f", within {show_size(budget)}" if budget else ""
    click.echo(
        f"{runtime}, {batch} x {context} tokens{share}{within}; bits per weight are those of the files"
    )
    print_table(head, rows)
    notes = {f"{row.name}: {row.why}" for row in found if row.why}
    for memory in (row.memory for row in found if row.memory):
        if memory.note:
            notes.add(memory.note)
        if memory.approximate:
            notes.add(f"figures for {runtime} are approximate")
    for note in sorted(notes):
        click.echo(f"note: {note}.")
    return None
