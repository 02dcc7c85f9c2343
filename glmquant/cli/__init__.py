"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

from __future__ import annotations

import os

import click

from .._version import __version__
from .bench import bench
from .chat import chat
from .check import check
from .convert import convert
from .evaluate import eval_
from .group import Group
from .hub import download
from .inspect import inspect
from .publish import publish
from .recipes import recipes
from .serve import serve
from .verify import verify

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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


for command in (bench, chat, check, convert, download, eval_, inspect, publish, recipes, serve, verify):
    main.add_command(command)
