"""``glmquant eval``: how much worse than its source a quantized model is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..checkpoint.output import REPORT
from ..errors import UsageError
from .terminal import json_option, print_rows, progress_bar


@click.command("eval")
@click.argument("out")
@click.option("--source", required=True, metavar="DIR", help="The checkpoint it was made from.")
@click.option("--text", type=click.Path(), metavar="FILE", help="UTF-8.  [default: a sample of WikiText-2]")
@click.option(
    "--second-half", is_flag=True, help="Use half of FILE, where the first half has served for calibration."
)
@click.option(
    "--window", type=click.IntRange(1), default=512, show_default=True, help="Tokens seen at a time."
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens from one window to the next.  [default: no overlap]",
)
@click.option("--windows", type=click.IntRange(1), metavar="N", help="At most.  [default: the whole text]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Of both models.  [default: float32 on a CPU, else as the source's config.json says]",
)
@click.option("--record", is_flag=True, help="Keep the figures in OUT, for its model card.")
@json_option
def eval_(
    out: str,
    source: str,
    text: str | None,
    second_half: bool,
    window: int,
    stride: int | None,
    windows: int | None,
    device: str,
    dtype: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Measure on text how much the model OUT differs from its source.

    \b
    glmquant eval chatglm3-6b-int4 --source chatglm3-6b                       on a sample of English Wikipedia
    glmquant eval chatglm3-6b-int4 --source chatglm3-6b --text mine.txt       on the text it is for
    glmquant eval chatglm3-6b-int4 --source chatglm3-6b --windows 4           a quick look

    Perplexity, KL divergence and how often both hold the same token for the likeliest, with standard errors. Both
    models are read block by block, so neither has to fit into memory. Exit status 1 if a model computes NaN.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    from .._evaluate import Estimate, evaluate

    if record and not (Path(out) / REPORT).is_file():
        raise UsageError(f"--record keeps the figures in a folder that convert wrote, and {out} is none.")

    with progress_bar("evaluating", quiet=as_json, unit="blocks") as report:
        found = evaluate(
            out,
            source,
            text,
            second_half=second_half,
            window=window,
            stride=stride,
            windows=windows,
            device=device,
            dtype=dtype,
            progress=report,
        )
    if record:
        from .._card import record_evaluation

        record_evaluation(Path(out), found.to_json())
    if as_json:
        return click.echo(json.dumps(found.to_json(), indent=2))

    def shown(figure: Estimate, digits: int = 4) -> str:
        error = "" if figure.error is None else f" ± {figure.error:.1g}"
        return f"{figure.value:.{digits}g}{error}"

    agreement = found.top1_agreement
    error = "" if agreement.error is None else f" ± {100 * agreement.error:.1g}"
    before = f", of which {found.prefix} are the tokenizer's" if found.prefix else ""
    rows = [
        ("text", f"{found.text}, {found.predictions} predicted tokens"),
        ("windows", f"{found.windows} of {found.window} tokens{before}, every {found.stride} tokens"),
        ("computed in", f"{found.dtype} on {found.device}"),
        ("perplexity", f"{shown(found.perplexity)}, source {shown(found.source_perplexity)}"),
        ("  ratio", shown(found.perplexity_ratio, 5)),
        ("KL divergence", f"{shown(found.kl_mean)} nats"),
        ("  99 % below", f"{shown(found.kl_p99)} nats"),
        ("same top token", f"{100 * agreement.value:.2f}{error} %"),
    ]
    return print_rows(rows)
