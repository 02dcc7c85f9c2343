"""``glmquant check``: the gate of a pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..recipe import parse_size, show_size
from .terminal import json_option, progress_bar


@click.command()
@click.argument("out")
@click.option("--vram", metavar="SIZE", help="Most memory of the process.  [default: what --fit recorded]")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens.  [default: --fit's, or 2048]")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences.  [default: --fit's, or 1]")
@click.option("--max-file-size", metavar="SIZE", help="Largest weight file.")
@click.option("--max-kld", type=float, metavar="X", help="Mean KL divergence from --reference, in nats.")
@click.option("--reference", metavar="SRC", help="What OUT was made from.")
@click.option(
    "--text",
    type=click.Path(),
    metavar="FILE",
    help="UTF-8, for --max-kld.  [default: a sample of WikiText-2]",
)
@click.option("--measure", is_flag=True, help="Run the model, and gate on what that takes.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--junit", type=click.Path(dir_okay=False), metavar="FILE", help="Write a JUnit report too.")
@json_option
def check(
    out: str,
    vram: str | None,
    context: int | None,
    batch: int | None,
    max_file_size: str | None,
    max_kld: float | None,
    reference: str | None,
    text: str | None,
    measure: bool,
    device: Any,
    junit: str | None,
    as_json: bool,
) -> None:
    """Check that the model in the folder OUT stays within the memory there is.

    \b
    glmquant check chatglm3-6b-int4 --vram 6GiB --context 8192
    glmquant check chatglm3-6b-int4 --vram 8GiB --device cpu --measure
    glmquant check chatglm3-6b-int4 --vram 6GiB --max-file-size 4GB --junit check.xml
    glmquant check chatglm3-6b-int4 --max-kld 0.1 --reference chatglm3-6b

    Exit status 0 if it does, 1 if it does not. Predicts from headers; with --measure it loads and runs the model.
    With --device cpu the memory is the resident memory of the process, and no VRAM. --max-kld does what eval does: both
    models are read block by block.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    from .._check import check as run

    if junit is not None and not Path(junit).absolute().parent.is_dir():
        raise UsageError(f"{junit} cannot be written, since its folder does not exist.")
    with progress_bar("evaluating", quiet=as_json or max_kld is None, unit="blocks") as progress:
        found = run(
            out,
            memory_limit=None if vram is None else parse_size(vram),
            context=context,
            batch=batch,
            max_file_size=None if max_file_size is None else parse_size(max_file_size),
            max_kld=max_kld,
            reference=reference,
            text=text,
            device=device,
            measure=measure,
            progress=progress,
        )
    if junit is not None:
        Path(junit).write_bytes(found.to_junit(out))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        sys.exit(0 if found.ok else 1)
    m = found.memory
    rows = [
        ("weights", show_size(m.weights + m.scales), "packed codes, scales, zero points"),
        ("16-bit rest", show_size(m.rest), "embeddings, head, norms, biases"),
        ("KV cache", show_size(m.cache), f"{found.workload.batch} x {found.workload.context} tokens"),
        ("activations", show_size(m.activations), "the whole prompt at once"),
        ("unpacking", show_size(m.workspace), "tiles of one layer"),
        ("allocated", show_size(m.allocated), "predicted peak"),
        *([("scratch", show_size(m.scratch), "of a CPU kernel, beside it")] if m.scratch else []),
        ("process", show_size(m.process), f"with {show_size(m.process_base)} of its own and allocator slack"),
        ("loading", show_size(m.load_peak), "predicted peak"),
    ]
    if any(gate.name.startswith(("VRAM", "memory")) for gate in found.gates):
        rows.append(("longest context", f"{found.longest}", "that stays within the limit"))
    for name, nbytes in (found.measured or {}).items():
        error = found.prediction_error.get(name)
        note = (
            ""
            if error is None
            else f"the prediction is {100 * abs(error):.1f} % {'above' if error > 0 else 'below'}"
        )
        rows.append((f"measured {name.replace('_', ', ')}", show_size(nbytes), note))
    if found.evaluation is not None:
        e = found.evaluation
        divergence = f"{e.kl_mean.value:.4g} nats"
        spread = "" if e.kl_mean.error is None else f"± {e.kl_mean.error:.1g}, "
        rows.append(
            ("KL divergence", divergence, f"{spread}{e.windows} windows of {e.window} tokens, {e.text}")
        )
        same, ratio = 100 * e.top1_agreement.value, e.perplexity_ratio.value
        rows.append(("same top token", f"{same:.1f} %", f"perplexity {ratio:.4g} times the source's"))
    width = max(len(row[0]) for row in rows)
    for name, size, note in rows:
        click.echo(f"{name:<{width}}  {size:>10}  {note}".rstrip())
    for gate in found.gates:
        click.echo(f"{'ok' if gate.ok else 'FAILED'}: {gate.name}: {gate}")
    sys.exit(0 if found.ok else 1)
