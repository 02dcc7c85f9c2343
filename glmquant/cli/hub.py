"""``glmquant download``: a model from a hub to this machine."""

from __future__ import annotations

import json

import click

from ..recipe import show_size
from .terminal import print_rows, progress_bar


def tell_which(ref: str) -> None:
    """Say so where a folder hides a well-known model of the same name."""
    from .. import hub

    note = hub.resolve(ref).note
    if note is not None:
        click.echo(f"note: {note}", err=True)


@click.command()
@click.argument("ref")
@click.option("--revision", metavar="R", help="Branch, tag or commit; the same as REF@R.")
@click.option("--include", multiple=True, metavar="PATTERN", help="These files instead of what is needed.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these files.")
@click.option(
    "--local-dir", type=click.Path(), metavar="DIR", help="Into this folder instead of the hub's own cache."
)
@click.option("--endpoint", metavar="URL", help="A mirror.  [default: HF_ENDPOINT, MODELSCOPE_ENDPOINT]")
@click.option("--token", metavar="TOKEN", help="Instead of the one you have logged in with.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def download(
    ref: str,
    revision: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    local_dir: str | None,
    endpoint: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Download the model REF: configuration, tokenizer, weights in one form; no code.

    \b
    glmquant download hf:THUDM/chatglm3-6b                        from Hugging Face, into its cache
    glmquant download ms:ZhipuAI/chatglm3-6b --local-dir glm3     from ModelScope, into a folder
    glmquant download hf:THUDM/chatglm3-6b --endpoint https://hf-mirror.com

    The same command goes on where an interrupted one ended. No file of yours in DIR is replaced. To quantize a model
    there is no need to download it first: glmquant convert takes a REF.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    from .. import hub

    if revision is not None:
        ref = f"{ref}@{revision}"
    with progress_bar("downloading", quiet=as_json) as report:
        found = hub.download(
            ref,
            include=include,
            exclude=exclude,
            local_dir=local_dir,
            endpoint=endpoint,
            token=token,
            progress=report,
        )
    if as_json:
        shown = {
            "ref": str(found.ref),
            "commit": found.commit,
            "folder": str(found.folder),
            "bytes": found.nbytes,
            "files": found.files,
        }
        return click.echo(json.dumps(shown, indent=2))
    rows = [
        ("model", f"{found.ref}"),
        ("commit", found.commit or "not asked for (HF_HUB_OFFLINE)"),
        ("size", f"{show_size(found.nbytes)} in {len(found.files)} files"),
        ("folder", f"{found.folder}"),
    ]
    return print_rows(rows)
