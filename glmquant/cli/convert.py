"""``glmquant convert``: a checkpoint into a smaller one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..formats.k_quants import K_TYPES
from ..recipe import CALIBRATED, METHODS, Calibration, Fit, Recipe, parse_size, show_size
from .hub import tell_which
from .terminal import endpoint_option, json_option, print_rows, progress_bar

if TYPE_CHECKING:
    from ..plan import Plan


def _group_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "row":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter("use 32, 64, 128 or row") from None


@click.command()
@click.argument("source")
@click.argument("out")
@click.option(
    "--bits", type=click.Choice(["4", "8", "16", "w8a8"]), help="w8a8: 8-bit activations too.  [default: 4]"
)
@click.option(
    "--group-size", callback=_group_size, metavar="32|64|128|row", help="Columns that share a scale."
)
@click.option(
    "--symmetric/--asymmetric", default=True, help="Without or with zero points.  [default: symmetric]"
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Default: the best one for the format that needs no calibration.",
)
@click.option(
    "--calibration",
    type=click.Path(),
    metavar="FILE",
    help=f"Text for --method {' and '.join(CALIBRATED)}, or 'random'.  [default: an English and Chinese sample]",
)
@click.option(
    "--calibration-windows",
    type=click.IntRange(1),
    metavar="N",
    help="Pieces of 512 tokens to calibrate with.  [default: 64]",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["compressed-tensors", "cpm", "gptq", "bitsandbytes", "gguf", "safetensors"]),
    help="How the weights are stored.  [default: compressed-tensors; cpm for ChatGLM-6B; safetensors with --bits 16]",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["q4_0", "q4_1", "q8_0", "f16", *K_TYPES]),
    help="In place of --format gguf --bits ... [--asymmetric]; q2_k to q6_k need llama.cpp's llama-quantize.",
)
@click.option("--double-quant", is_flag=True, help="Of --format bitsandbytes: quantize scales too.")
@click.option(
    "--gptq-version", type=click.Choice(["1", "2"]), help="Of --format gptq's checkpoints.  [default: 1]"
)
@click.option("--layout", type=click.Choice(["native", "original"]), help="transformers' names or THUDM's.")
@click.option("--quantize-head", is_flag=True, help="Output head in 8 bit instead of 16 (not in cpm).")
@click.option(
    "--quantize-embeddings",
    is_flag=True,
    help="Input embeddings in 8 bit; in cpm (ChatGLM-6B only) they and the head at --bits.",
)
@click.option("--fit", metavar="SIZE", help="Choose bits and groups per layer to run within this memory.")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens, for --fit.  [default: 8192]")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences, for --fit.  [default: 1]")
@click.option(
    "--measurement",
    type=click.Path(),
    metavar="FILE",
    help="For --fit: what recipes --save has written.  [default: measure]",
)
@click.option("--adapter", type=click.Path(), metavar="DIR", help="Merge this LoRA (PEFT) first.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to quantize: auto is a GPU if there is one.",
)
@click.option("--workers", type=click.IntRange(1), help="Threads.  [default: one for each core]")
@click.option("--max-shard-size", default="4GB", show_default=True, metavar="SIZE", help="Largest file.")
@click.option("--resume", is_flag=True, help="Go on from the whole shards of an interrupted run.")
@click.option("--force", is_flag=True, help="Replace an OUT that glmquant wrote.")
@click.option("--keep-source", is_flag=True, help="Of a SOURCE on a hub: keep it in the hub's own cache.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@endpoint_option
@json_option
def convert(
    source: str,
    out: str,
    bits: str | None,
    group_size: Any,
    symmetric: bool,
    method: str | None,
    calibration: str | None,
    calibration_windows: int | None,
    format_: str | None,
    gguf_type: str | None,
    double_quant: bool,
    gptq_version: str | None,
    layout: str | None,
    quantize_head: bool,
    quantize_embeddings: bool,
    fit: str | None,
    context: int | None,
    batch: int | None,
    measurement: str | None,
    adapter: str | None,
    device: str,
    workers: int | None,
    max_shard_size: str,
    resume: bool,
    force: bool,
    keep_source: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize the checkpoint SOURCE into the new folder OUT.

    \b
    glmquant convert chatglm3-6b out                                 INT4, groups of 128, for transformers and vLLM
    glmquant convert chatglm3-6b out --bits 8                        INT8
    glmquant convert chatglm3-6b out --method gptq                   the best INT4, calibrated on text; takes longer
    glmquant convert chatglm-6b out --format cpm                     THUDM's own INT4, byte for byte
    glmquant convert chatglm3-6b out --gguf-type q4_0                for llama.cpp
    glmquant convert chatglm3-6b out --bits 16                       only make it load without remote code
    glmquant convert chatglm3-6b out --fit 6GiB --context 8192       the best that runs within 6 GiB
    glmquant convert chatglm3-6b out --adapter my-lora               merge a fine-tune on the way
    glmquant convert hf:THUDM/chatglm3-6b out                        while it comes in from a hub (ms: ModelScope)

    OUT appears when it is whole and verified, never before.
    """  # noqa: D301 - see main
    from .._convert import convert as run
    from .._convert import plan_conversion

    tell_which(source)
    if gguf_type is not None:
        if bits is not None or not symmetric or format_ not in (None, "gguf"):
            raise UsageError("--gguf-type says it all; leave out --bits, --asymmetric and --format.")
        widths = {"q4_0": "4", "q4_1": "4", "q8_0": "8"}  # the others begin as F16
        format_, bits, symmetric = "gguf", widths.get(gguf_type, "16"), gguf_type != "q4_1"
    recipe = Recipe(
        bits=8 if bits == "w8a8" else int(bits or 4),
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        calibration=calibration_of(calibration, calibration_windows),
        format=format_,
        layout=layout,
        quantize_head=quantize_head,
        quantize_embeddings=quantize_embeddings,
        max_shard_size=parse_size(max_shard_size),
        gptq_version=int(gptq_version) if gptq_version else None,
        double_quant=double_quant,
        k_quant=gguf_type if gguf_type in K_TYPES else None,
        activations=8 if bits == "w8a8" else None,
        fit=_fit(fit, bits, context, batch, measurement),
    )
    if dry_run:
        with progress_bar("measuring", quiet=as_json, unit="layers") as measuring:
            plan = plan_conversion(
                source,
                recipe,
                adapter=adapter,
                measurement=measurement,
                keep_source=keep_source,
                measuring=measuring,
            )
        if as_json:
            return click.echo(json.dumps(plan.to_json(), indent=2))
        return _print_plan(plan)
    with (
        progress_bar("measuring", quiet=as_json or not fit, unit="layers") as measuring,
        progress_bar("converting", quiet=as_json) as progress,
    ):
        result = run(
            source,
            out,
            recipe,
            adapter=adapter,
            device=device,
            workers=workers,
            resume=resume,
            force=force,
            keep_source=keep_source,
            measurement=measurement,
            progress=progress,
            measuring=measuring,
        )
    if as_json:
        return click.echo(json.dumps({"out": str(result.out), **result.report}, indent=2))
    for note in [*result.plan.notes, *result.hints]:
        click.echo(f"note: {note}")
    summary = result.report["summary"]
    ratio = summary["source_bytes"] / summary["bytes"]
    rows = [
        ("written", f"{result.out}"),
        ("format", f"{result.plan.recipe.format}, {result.plan.recipe.layout} layout"),
        (
            "size",
            f"{show_size(summary['bytes'])}, {ratio:.2f} times smaller, {summary['bits_per_weight']} bits per weight",
        ),
    ]
    if result.plan.recipe.fit is not None:
        rows.append(("fits", result.plan.recipe.fit.summary()))
    if "worst_tensor" in summary:
        error = f"{summary['mean_relative_error']:.4f} mean, {summary['worst_relative_error']:.4f} worst"
        rows.append(("error", f"{error} ({summary['worst_tensor']})"))
    return print_rows(rows)


def calibration_of(text: str | None, windows: int | None) -> Calibration | None:
    """What the two options say; None where neither is given."""
    if text is None and windows is None:
        return None
    return Calibration(text) if windows is None else Calibration(text, windows)


def _fit(
    size: str | None, bits: str | None, context: int | None, batch: int | None, measurement: str | None
) -> Fit | None:
    if size is None:
        if context or batch or measurement:
            raise UsageError(
                "--context, --batch and --measurement are for --fit SIZE; give it too, or leave them out."
            )
        return None
    if bits is not None:
        raise UsageError("--fit chooses the bits of every layer; leave out --bits, or --fit.")
    return Fit(parse_size(size), context or 8192, batch or 1)


def _print_plan(plan: Plan) -> None:
    recipe = plan.recipe
    method = f", {recipe.method}" if recipe.method else ""
    method += f", {recipe.calibration}" if recipe.calibration else ""
    click.echo(f"{plan.model}: {recipe.bits} bit{method}, {recipe.format}, {recipe.layout} layout")
    click.echo(f"{'tensor':<58} {'shape':>16}  {'from':<5} {'to':<15} {'MiB':>9}")
    for item in plan.items:
        shape = " x ".join(str(n) for n in item.shape)
        target = str(item.scheme) if item.scheme else item.outputs[0].dtype
        click.echo(f"{item.name:<58} {shape:>16}  {item.dtype:<5} {target:<15} {item.nbytes / 2**20:>9.2f}")
    click.echo(
        f"reads {show_size(plan.source_nbytes)}, writes {show_size(plan.nbytes)} in {len(plan.shards)} files"
    )
    if recipe.fit is not None:
        for choice in recipe.fit.choices:
            click.echo(f"{choice.name}: {choice}; {choice.reason}")
        click.echo(f"fits: {recipe.fit.summary()}")
    for note in plan.notes:
        click.echo(f"note: {note}")
