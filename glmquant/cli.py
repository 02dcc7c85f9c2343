"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ._bench_cli import bench
from ._chat_cli import chat
from ._check_cli import check
from ._eval_cli import eval_
from ._hub_cli import download, tell_which
from ._publish_cli import publish
from ._recipes_cli import recipes
from ._serve_cli import serve
from ._terminal import endpoint_option, json_option, print_rows, progress_bar
from ._version import __version__
from .errors import GlmquantError, UsageError
from .recipe import CALIBRATED, Calibration, Fit, Recipe, parse_size, show_size

if TYPE_CHECKING:
    from .plan import Plan

_SHOWN_PROBLEMS = 20  # with the wrong source there is one for every weight


class _Group(click.Group):
    """Turns our errors into one sentence and the exit status that goes with them."""

    def invoke(self, ctx: click.Context) -> Any:
        with _noting_interrupts() as interrupts:
            try:
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit):
                raise
            except (Exception, KeyboardInterrupt) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    advice = (
                        "; OUT is as it was, the same command with --resume goes on from the whole shards"
                        if ctx.invoked_subcommand == "convert"
                        else ""
                    )
                    self._fail(ctx, f"interrupted{advice}.", 130)
                if isinstance(error, GlmquantError):
                    self._fail(ctx, str(error), error.exit_status)
                # `glmquant inspect ... | head` is left to click, which ends quietly.
                if isinstance(error, OSError) and error.errno != errno.EPIPE:
                    # a disk or a permission that nobody foresaw
                    where = f"{error.filename}: " if error.filename else ""
                    self._fail(ctx, f"{where}{error.strerror or error}.", GlmquantError.exit_status)
                raise

    @staticmethod
    def _fail(ctx: click.Context, message: str, status: int) -> NoReturn:
        if ctx.params.get("debug"):
            traceback.print_exc()
        click.echo(f"glmquant: {message}", err=True)
        ctx.exit(status)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and leaves a note.

    The note is needed where native code was calling back into Python: safetensors for one turns whatever it gets
    there into an error of its own.
    """
    noted: list[int] = []

    def handle(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    # Only the main thread may, and whoever ignores the signal (nohup) goes on ignoring it.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glmquant")
@click.option("--debug", is_flag=True, help="Show a traceback with errors.")
@click.option(
    "--install-completion",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, param, value: _completion(ctx) if value else None,
    help="Print how to enable shell completion, and exit.",
)
def main(debug: bool) -> None:
    """Quantize ChatGLM and GLM checkpoints to INT4 / INT8 that load everywhere.

    \b
    glmquant inspect chatglm3-6b
    glmquant convert chatglm3-6b chatglm3-6b-int4
    glmquant verify  chatglm3-6b-int4 --source chatglm3-6b
    glmquant chat    chatglm3-6b-int4

    A model is a folder, or one on a hub: hf:org/name@revision on Hugging Face, ms:org/name on ModelScope, and org/name
    on Hugging Face unless there is a folder of that name.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would break into ours


def _completion(ctx: click.Context) -> None:
    click.echo("Add the line for your shell to its start-up file:")
    for shell, file in (("bash", "~/.bashrc"), ("zsh", "~/.zshrc")):
        click.echo(f'  {file}:  eval "$(_GLMQUANT_COMPLETE={shell}_source glmquant)"')
    click.echo("  fish:  _GLMQUANT_COMPLETE=fish_source glmquant | source")
    ctx.exit()


def _group_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "row":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter("use 32, 64, 128 or row") from None


@main.command()
@click.argument("ref")
@endpoint_option
@json_option
def inspect(ref: str, as_json: bool) -> None:
    """Describe the checkpoint REF: sizes, quantization, memory.

    \b
    glmquant inspect chatglm3-6b
    glmquant inspect chatglm3-6b-int4 --json
    glmquant inspect hf:THUDM/chatglm3-6b

    Reads config.json and headers only, also of a model on a hub.
    """  # noqa: D301 - see main
    from ._inspect import inspect as run

    tell_which(ref)
    found = run(ref)
    if as_json:
        return click.echo(json.dumps(found.to_json(), indent=2))
    d = found.dims
    rows = [
        ("model", f"{found.model} ({found.family}, {found.layout} layout)"),
        (
            "weights",
            f"{found.parameters / 1e9:.2f} billion, {show_size(found.nbytes)} in {len(found.files)} files",
        ),
        ("stored as", ", ".join(f"{t} {show_size(n)}" for t, n in found.dtypes.items())),
        ("quantization", ", ".join(f"{s} ({n} weights)" for s, n in found.schemes.items()) or "none"),
        (
            "layers",
            f"{d.layers} x {d.hidden}, {d.heads} heads ({d.kv_heads} KV) of {d.head_dim}, MLP {d.ffn}",
        ),
        ("vocabulary", f"{d.vocab}"),
        ("memory", f"weights {show_size(found.nbytes)}, and a 16-bit KV cache for one sequence of"),
    ]
    contexts = sorted({n for n in (2048, 8192, d.context) if n <= d.context})
    rows += [("", f"  {n:>6} tokens  {show_size(found.cache_bytes(n))}") for n in contexts]
    print_rows(rows)
    return None


@main.command()
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
    type=click.Choice(["rtn", "mse", "hqq", "thudm", *CALIBRATED]),
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
)
@click.option(
    "--gguf-type",
    type=click.Choice(["q4_0", "q4_1", "q8_0", "f16"]),
    help="In place of --format gguf --bits ... [--asymmetric].",
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
    from ._convert import convert as run
    from ._convert import plan_conversion

    tell_which(source)
    if gguf_type is not None:
        if bits is not None or not symmetric or format_ not in (None, "gguf"):
            raise UsageError("--gguf-type says it all; leave out --bits, --asymmetric and --format.")
        format_, bits, symmetric = "gguf", {"q8_0": "8", "f16": "16"}.get(gguf_type, "4"), gguf_type != "q4_1"
    recipe = Recipe(
        bits=8 if bits == "w8a8" else int(bits or 4),
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        calibration=_calibration(calibration, calibration_windows),
        format=format_,
        layout=layout,
        quantize_head=quantize_head,
        quantize_embeddings=quantize_embeddings,
        max_shard_size=parse_size(max_shard_size),
        gptq_version=int(gptq_version) if gptq_version else None,
        double_quant=double_quant,
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


def _calibration(text: str | None, windows: int | None) -> Calibration | None:
    if text is None and windows is None:
        return None
    return Calibration(text) if windows is None else Calibration(text, windows)


@main.command()
@click.argument("out")
@click.option(
    "--source", metavar="REF|DIR", help="Measure the error against the checkpoint it was made from."
)
@click.option("--adapter", type=click.Path(), metavar="DIR", help="The LoRA that was merged into it.")
@json_option
def verify(out: str, source: str | None, adapter: str | None, as_json: bool) -> None:
    """Check the folder OUT: structure, hashes, decoding.

    \b
    glmquant verify chatglm3-6b-int4                          every tensor, every recorded hash, every weight
    glmquant verify chatglm3-6b-int4 --source chatglm3-6b     and its error, against the report's

    Exit status 1 if anything is wrong.
    """  # noqa: D301 - see main
    from ._verify import verify as run

    if adapter is not None and source is None:
        raise UsageError("--adapter says what was merged into the source; give the --source too.")
    with progress_bar("verifying", quiet=as_json, unit="tensors") as progress:
        found = run(out, source, adapter=adapter, progress=progress)
    if as_json:
        shown = {
            "ok": found.ok,
            "problems": found.problems,
            "files": found.files,
            "tensors": found.tensors,
            "quantized": found.quantized,
            "errors": found.errors,
        }
        click.echo(json.dumps(shown, indent=2))
    else:
        for problem in found.problems[:_SHOWN_PROBLEMS]:
            click.echo(f"problem: {problem}")
        if len(found.problems) > _SHOWN_PROBLEMS:
            click.echo(f"problem: and {len(found.problems) - _SHOWN_PROBLEMS} more (--json lists all)")
        rows = [
            ("tensors", f"{found.tensors}, of which {found.quantized} quantized weights were decoded"),
            (
                "hashes",
                f"{found.files} files compared"
                if found.files
                else "none recorded (no quantization_report.json)",
            ),
        ]
        if found.errors:
            worst = max(found.errors, key=lambda name: found.errors[name])
            mean = sum(found.errors.values()) / len(found.errors)
            rows.append(("error", f"{mean:.4f} mean, {found.errors[worst]:.4f} worst ({worst})"))
        rows.append(("verdict", "sound" if found.ok else f"{len(found.problems)} problems"))
        print_rows(rows)
    if not found.ok:
        sys.exit(1)


def _print_plan(plan: Plan) -> None:
    recipe = plan.recipe
    method = f", {recipe.method}" if recipe.method else ""
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


for command in (bench, chat, check, download, eval_, publish, recipes, serve):
    main.add_command(command)

if __name__ == "__main__":
    main()
