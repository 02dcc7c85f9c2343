"""``glmquant verify``: whether a folder is what it should be."""

from __future__ import annotations

import json
import sys

import click

from ..errors import UsageError
from ..hub import resolve
from .terminal import json_option, print_rows, progress_bar

_SHOWN_PROBLEMS = 20  # with the wrong source there is one for every weight


@click.command()
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
    resolve(out)  # before torch is imported, which takes seconds
    from .._verify import verify as run

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
