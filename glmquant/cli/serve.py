"""``glmquant serve``: the model behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import UsageError
from ..hub import resolve
from ..recipe import parse_size, show_size


@click.command()
@click.argument("out")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option("--adapter", type=click.Path(), metavar="DIR", help="Merge this LoRA (PEFT) first.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Default: as config.json says."
)
@click.option("--vram", metavar="SIZE", help="Most memory of the process.  [default: what is free]")
@click.option(
    "--context", type=click.IntRange(2), metavar="N", help="Tokens of a request.  [default: up to 8192]"
)
@click.option(
    "--max-batch", type=click.IntRange(1), metavar="N", help="Requests at a time, if they fit.  [default: 16]"
)
@click.option(
    "--queue", type=click.IntRange(0), default=128, show_default=True, help="Requests that may wait."
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, metavar="S",
              help="Seconds from a request's arrival to the end of its answer, waiting included.")  # fmt: skip
@click.option("--name", help="Of the model in answers.  [default: the folder's]")
@click.option("--strict-model", is_flag=True, help="Refuse requests that name another model.")
@click.option("--api-key", envvar="GLMQUANT_API_KEY", help="Required of clients.  [env: GLMQUANT_API_KEY]")
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="Let pages of this origin ask; may be repeated."
)
@click.option("--allow-host", multiple=True, metavar="NAME",
              help="Another name for a server on 127.0.0.1, as behind a proxy; * is any.")  # fmt: skip
@click.option("--max-body", default="4MiB", show_default=True, metavar="SIZE", help="Largest request.")
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log on stderr.")
def serve(
    out: str,
    host: str,
    port: int,
    adapter: str | None,
    device: str,
    dtype: str | None,
    vram: str | None,
    context: int | None,
    max_batch: int | None,
    queue: int,
    timeout: float,
    name: str | None,
    strict_model: bool,
    api_key: str | None,
    cors: tuple[str, ...],
    allow_host: tuple[str, ...],
    max_body: str,
    log_prompts: bool,
) -> None:
    """Serve the model in the folder OUT over HTTP.

    \b
    glmquant serve chatglm3-6b-int4                                        a page to chat with at http://127.0.0.1:8000
    glmquant serve chatglm3-6b-int4 --vram 8GiB --context 4096 --max-batch 32
    GLMQUANT_API_KEY=... glmquant serve chatglm3-6b-int4 --host 0.0.0.0

    \b
    POST /                       ChatGLM-6B's and ChatGLM2-6B's API (LangChain's ChatGLM)
    POST /v1/chat/completions    ChatGLM3-6B's and OpenAI's (LangChain's ChatGLM3, openai)
    also /v1/completions, /v1/models, /health, /metrics, /openapi.json

    SIGTERM or Ctrl-C lets what runs finish, for --timeout at most, and refuses what waits; a second one ends at once.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    resolve(out)  # before torch is imported, which takes seconds
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}; pip install 'glmquant[serve]'.") from None
    from ..serve.app import create_app
    from ..serve.guard import hosts_of, is_loopback
    from ..serve.server import Server, build, configure, listen_on, open_model
    from ..serve.service import Settings

    if api_key == "":
        raise UsageError("the API key is empty; leave it out to let everybody in.")
    largest = parse_size(max_body)
    limit = None if vram is None else parse_size(vram)
    bound = listen_on(host, port)  # before the time for loading is spent
    click.echo(f"loading {out} ...", err=True)
    model, tokenizer, admission = open_model(
        out, device=device, dtype=dtype, adapter=adapter, vram=limit, context=context, max_batch=max_batch
    )
    settings = Settings(name or Path(out).name, strict_model, timeout, log_prompts)
    service = build(model, tokenizer, admission, settings, queue)
    app = create_app(service, api_key=api_key, max_body=largest, cors=cors, hosts=hosts_of(host, allow_host))
    address = f"[{host}]" if ":" in host else host
    if api_key is None and not is_loopback(host):
        click.echo(
            "glmquant: anybody who reaches this machine can ask; --api-key would keep strangers out.",
            err=True,
        )
    click.echo(
        f"{settings.name}: {admission.slots} requests of {admission.context} tokens at a time, "
        f"{show_size(admission.memory.peak)} of memory at most\n"
        f"listening on http://{address}:{bound.getsockname()[1]}"
    )
    Server(configure(app), service.engine, timeout).run(sockets=[bound])
    if not service.engine.stop(timeout=5):
        os._exit(0)  # a thread inside of torch while Python goes down would abort the process
