"""``glmquant chat``: a conversation on a terminal or through a pipe.

On a terminal the answers appear as they are written. Where stdin is no terminal, every line is a query of one
conversation, and stdout gets the answers and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import Any

import click

from ..errors import GlmquantError, UsageError
from ..hub import resolve

_HELP = """\
/clear        forget the conversation (or: clear)
/system TEXT  forget the conversation and start one with this instruction; without TEXT, with none
/history      show the conversation
/stop         leave (or: stop, Ctrl-D, Ctrl-C twice)
Ctrl-C stops an answer. Anything else is said to the model."""
_WELCOME = "Type to talk; /clear forgets the conversation, /stop ends, /help lists all commands."
# ChatGLM-6B's answers get full-width marks where the next character is Chinese, so the last one may still change.
_MAY_CHANGE = tuple(",!:;?")
# What a terminal would obey: all control characters but tab and line break.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_AGAIN = 1.0  # seconds in which a second Ctrl-C ends the program, where stdin is no terminal


class Conversation:
    """A model, its tokenizer and what has been said.

    Args:
        model: what `glmquant.load` returns.
        tokenizer: what `glmquant.load_tokenizer` returns.
        system: instruction in front of the conversation; not every generation has such a role.
        options: for the model's `stream_chat`; what is left out is the generation's default.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, **options: Any) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.start(system)

    def start(self, system: str | None) -> None:
        """Forget what was said.

        Raises:
            UsageError: the model knows no system role; then nothing is forgotten.
        """
        self.history = opening(self._tokenizer, system)
        self.system = system

    def ask(self, query: str) -> Iterator[str]:
        """The answer as far as it is written, again and again.

        A conversation that is broken off keeps the part of the answer that was there.
        """
        stream = self._model.stream_chat(self._tokenizer, query, history=list(self.history), **self._options)
        with contextlib.closing(stream):
            for response, history in stream:
                self.history = history
                # ChatGLM3 gives a call of a tool as a dictionary
                yield response if isinstance(response, str) else "\n".join(map(str, response.values()))

    def lines(self) -> Iterator[str]:
        """What was said, for people; both forms of history that the generations have."""
        for item in self.history:
            if isinstance(item, dict):
                yield f"{item['role']}: {item['content']}"
            else:
                yield from (f"user: {item[0]}", f"assistant: {item[1]}")


def opening(tokenizer: Any, system: str | None) -> list[Any]:
    """The history of a conversation that begins with the instruction `system`.

    Raises:
        UsageError: the model that `tokenizer` belongs to knows no system role.
    """
    if not system:
        return []
    from ..prompts import prompt_for

    return prompt_for(tokenizer).history([{"role": "system", "content": system}])


def show(answer: Iterable[str], write: Callable[[str], None]) -> None:
    """Write an answer while it grows: only what comes new, and only what will stay."""
    shown = text = ""
    for text in answer:
        ready = text[:-1] if text.endswith(_MAY_CHANGE) else text
        if ready.startswith(shown):
            write(ready[len(shown) :])
            shown = ready
    if text.startswith(shown):
        write(text[len(shown) :])
    else:  # bytes that are no text may change what was read before them: say that line again
        lines = zip(shown.splitlines(True), text.splitlines(True), strict=False)
        same = takewhile(lambda pair: pair[0] == pair[1], lines)
        write("\n" + text[sum(len(line) for line, _ in same) :])


def printable(text: str) -> str:
    """Text without what a terminal would take for a command."""
    return _CONTROLS.sub("", text)


def _write(text: str) -> None:
    click.echo(text, nl=False)


def reply(conversation: Conversation, query: str) -> None:
    """Answer on stdout: word by word on a terminal, else in one piece, which may be one that Ctrl-C cut short."""
    answer = conversation.ask(query)
    if sys.stdout.isatty():
        show(map(printable, answer), _write)
        click.echo()
        return
    last = deque([""], maxlen=1)
    try:
        last.extend(answer)
    except KeyboardInterrupt:
        click.echo(last[0])
        raise
    click.echo(last[0])


def follow(conversation: Conversation, queries: Iterable[str]) -> bool:
    """Answer line after line; commands work here too, and what they show goes to stderr.

    Ctrl-C stops an answer, and what cannot be answered is told on stderr; the next line follows.

    Returns:
        Whether every line was answered, if only in part.

    Raises:
        KeyboardInterrupt: Ctrl-C came twice in a second, or where there was no answer to stop.
    """
    presses: list[float] = []

    def note(number: int, frame: object) -> None:
        presses.append(time.monotonic())
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGINT, note)
    well = True
    for line in queries:
        query = line.strip()
        try:
            if query and not command(conversation, query, err=True):
                reply(conversation, query)
        except GlmquantError as error:
            click.echo(f"glmquant: {error}", err=True)
            well = False
        except KeyboardInterrupt:
            if len(presses) > 1 and presses[-1] - presses[-2] < _AGAIN:
                raise
            if sys.stdout.isatty():
                click.echo()
            click.echo("glmquant: the answer was stopped.", err=True)
        except click.exceptions.Exit:  # /stop
            break
    return well


def talk(conversation: Conversation) -> None:
    """Ask and answer on a terminal until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history
    click.echo(_WELCOME)
    warned = False
    while True:
        try:
            query = input("\nYou: ").strip()
        except EOFError:
            return click.echo()
        except UnicodeDecodeError:
            click.echo("that was not UTF-8; try again.", err=True)
            continue
        except KeyboardInterrupt:
            if warned:
                return click.echo()
            click.echo("\nCtrl-C once more, Ctrl-D or /stop to leave.")
            warned = True
            continue
        warned = False
        query = {"stop": "/stop", "clear": "/clear"}.get(query, query)
        if not query:
            continue
        try:
            if command(conversation, query):
                continue
            _write("ChatGLM: ")
            reply(conversation, query)
        except KeyboardInterrupt:
            click.echo(" (stopped)")
        except GlmquantError as error:
            click.echo(f"\nglmquant: {error}", err=True)


def command(conversation: Conversation, line: str, err: bool = False) -> bool:
    """Do what a line that starts with a command says; False for any other line."""
    name, _, rest = line.partition(" ")
    if name in ("/stop", "/exit", "/quit"):
        raise click.exceptions.Exit(0)
    if name == "/system":
        conversation.start(rest.strip() or None)
        click.echo(
            "A new conversation" + (", with this instruction." if conversation.system else "."), err=err
        )
    elif rest:
        return False
    elif name == "/clear":
        conversation.start(conversation.system)
        if not err:
            click.clear()
            click.echo(_WELCOME)
    elif name == "/history":
        for said in conversation.lines():
            click.echo(printable(said), err=err)
    elif name == "/help":
        click.echo(_HELP, err=err)
    else:
        return False
    return True


@click.command()
@click.argument("out")
@click.option("--adapter", type=click.Path(), metavar="DIR", help="Merge this LoRA (PEFT) first.")
@click.option("--prompt", metavar="TEXT", help="Answer this, and end.")
@click.option("--system", metavar="TEXT", help="Instruction for the model (ChatGLM3, GLM-4).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Default: as config.json says."
)
@click.option("--max-length", type=click.IntRange(1), metavar="N", help="Tokens of conversation and answer.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), metavar="T")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="P")
@click.option("--greedy", is_flag=True, help="Always the likeliest token.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option(
    "--truncate", is_flag=True, help="Leave out the oldest part of a conversation that is too long."
)
def chat(
    out: str,
    adapter: str | None,
    prompt: str | None,
    system: str | None,
    device: str,
    dtype: str | None,
    max_length: int | None,
    temperature: float | None,
    top_p: float | None,
    greedy: bool,
    seed: int | None,
    truncate: bool,
) -> None:
    """Talk to the model in the folder OUT.

    \b
    glmquant chat chatglm3-6b-int4                            on the terminal; /help lists the commands
    glmquant chat chatglm3-6b-int4 --prompt "你好" --greedy    one answer
    glmquant chat chatglm3-6b-int4 < questions.txt            each line is a query, stdout gets the answers

    Sampling is that of the model's generation where no option says otherwise.

    Ctrl-C stops an answer, and the conversation goes on. In a pipe, a second one within a second ends the program;
    a line that cannot be answered is told on stderr, and makes the exit status 2 at the end.
    """  # noqa: D301 - click wants the character itself: a paragraph that is not to be wrapped
    if greedy and (temperature is not None or top_p is not None):
        raise UsageError("--greedy takes the likeliest token, so leave out --temperature and --top-p.")
    given = {"max_length": max_length, "temperature": temperature, "top_p": top_p}
    resolve(out)  # before torch is imported, which takes seconds
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if greedy:
        options["do_sample"] = False
    if truncate:
        options["truncate"] = True
    on_terminal = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        click.echo(f"loading {out} ...", err=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show

    from .. import load, load_tokenizer

    tokenizer = load_tokenizer(out)
    opening(tokenizer, system)  # before the time for loading is spent
    conversation = Conversation(
        load(out, device=device, dtype=dtype, adapter=adapter), tokenizer, system, **options
    )
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    if prompt is not None:
        reply(conversation, prompt)
    elif on_terminal:
        # From here on Ctrl-C is part of the conversation, and no sign that the program failed.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        talk(conversation)
    elif not follow(conversation, (line.decode(errors="replace") for line in sys.stdin.buffer)):
        raise click.exceptions.Exit(2)
