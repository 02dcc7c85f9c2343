"""``glmquant publish``: a converted model onto a hub."""

from __future__ import annotations

import json
import os
import sys

import click

from ..recipe import show_size
from .terminal import json_option, print_rows, print_table, progress_bar


@click.command()
@click.argument("out")
@click.option("--to", required=True, metavar="hf:ORG/NAME|ms:ORG/NAME", help="Created if it is not there.")
@click.option("--private", is_flag=True, help="Only for the owner to see.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files, upload nothing.")
@click.option("--endpoint", metavar="URL", help="A mirror.  [default: HF_ENDPOINT, MODELSCOPE_ENDPOINT]")
@click.option("--token", metavar="TOKEN", help="Instead of the one you have logged in with.")
@json_option
def publish(
    out: str, to: str, private: bool, dry_run: bool, endpoint: str | None, token: str | None, as_json: bool
) -> None:
    """Publish the folder OUT, which convert wrote, on a hub.

    \b
    glmquant publish chatglm3-6b-int4 --to hf:me/chatglm3-6b-int4 --dry-run      the card and the files
    glmquant publish chatglm3-6b-int4 --to hf:me/chatglm3-6b-int4                to Hugging Face
    glmquant publish chatglm3-6b-int4 --to ms:me/chatglm3-6b-int4 --private      to ModelScope, for yourself

    The folder is verified first and its model card written; afterwards the hashes of what the hub has are compared. The
    same command goes on where an interrupted one ended.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    if sys.stderr.isatty() and not as_json:
        os.environ.pop("TQDM_DISABLE", None)  # the upload is shown by the hub's client
    from .._publish import publish as run

    with progress_bar("verifying", quiet=as_json, unit="tensors") as progress:
        found = run(
            out, to, private=private, dry_run=dry_run, endpoint=endpoint, token=token, progress=progress
        )
    total = sum(found.files.values())
    if as_json:
        shown = {
            "ref": str(found.ref),
            "page": found.page,
            "commit": found.commit,
            "bytes": total,
            "files": dict(found.files),
            "notes": list(found.notes),
            **({"card": found.card} if dry_run else {}),
        }
        return click.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    if dry_run:
        click.echo(found.card)
        print_table(("file", "size"), [(name, show_size(size)) for name, size in found.files.items()])
    for note in found.notes:
        click.echo(f"note: {note}.")
    rows = [
        ("model", f"{found.ref}" if found.page is None else found.page),
        ("size", f"{show_size(total)} in {len(found.files)} files"),
        ("published", "nothing, as asked for (--dry-run)" if dry_run else found.commit or "it was all there"),
    ]
    return print_rows(rows)
