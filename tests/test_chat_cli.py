"""``glmquant chat`` with a model that repeats what it is asked: on a pseudo-terminal, in a pipe, for one answer."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_chat
import pytest
from click.testing import CliRunner, Result

import glmquant
from glmquant.cli import main
from glmquant.cli.chat import Conversation, command, reply, show

chat_command = importlib.import_module("glmquant.cli.chat")  # not the command of that name

needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_CHAT_LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    return tmp_path / "log"


def logged(log: Path, kind: str) -> list[list[Any]]:
    return [rest for found, *rest in map(json.loads, log.read_text().splitlines()) if found == kind]


@pytest.fixture
def run(log: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`glmquant chat` in this process, with stdin and stdout that are no terminals."""
    monkeypatch.setattr(glmquant, "load", fake_chat.load, raising=False)
    monkeypatch.setattr(glmquant, "load_tokenizer", fake_chat.load_tokenizer, raising=False)

    def runner(*args: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, ["chat", "OUT", *args], input=stdin)

    return runner


# Without a terminal


def test_one_answer(run: Any, log: Path) -> None:
    result = run("--prompt", "你好,世界", "--system", "Be brief.")
    assert (result.stdout, result.stderr, result.exit_code) == ("你好,世界\n", "", 0)
    assert logged(log, "load") == [["OUT", {"device": "auto", "dtype": None, "adapter": None}]]
    assert logged(log, "asked") == [["你好,世界", [{"role": "system", "content": "Be brief."}], {}]]


def test_each_line_of_a_pipe_is_a_query_of_one_conversation(run: Any, log: Path) -> None:
    result = run(stdin="first\n\n  second  \nthird")
    assert (result.stdout, result.stderr, result.exit_code) == ("first\nsecond\nthird\n", "", 0)
    assert [history for _, history, _ in logged(log, "asked")] == [
        [],
        [["first", "first"]],
        [["first", "first"], ["second", "second"]],
    ]


def test_commands_in_a_pipe_leave_stdout_alone(run: Any, log: Path) -> None:
    lines = ["one", "/history", "/clear", "two", "/system Be kind.", "/help me", "/stop", "never"]
    result = run(stdin="\n".join(lines))
    assert (result.stdout, result.exit_code) == ("one\ntwo\n/help me\n", 0)
    assert result.stderr == "user: one\nassistant: one\nA new conversation, with this instruction.\n"
    assert [history for _, history, _ in logged(log, "asked")] == [
        [],
        [],
        [{"role": "system", "content": "Be kind."}],
    ]


def test_the_bare_words_of_the_terminal_are_queries_in_a_pipe(run: Any) -> None:
    assert run(stdin="stop\nclear\n").stdout == "stop\nclear\n"


def test_options_reach_the_model(run: Any, log: Path) -> None:
    run("--prompt", "x", "--max-length", "99", "--temperature", "0.5", "--top-p", "0.7")
    run(
        "--prompt",
        "x",
        "--greedy",
        "--truncate",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--adapter",
        "my-lora",
    )
    first, second = (options for *_, options in logged(log, "asked"))
    assert first == {"max_length": 99, "temperature": 0.5, "top_p": 0.7}
    assert second == {"do_sample": False, "truncate": True}
    assert logged(log, "load")[1] == ["OUT", {"device": "cpu", "dtype": "float32", "adapter": "my-lora"}]


def test_seed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    drawn = []

    def stream_chat(self: Any, tokenizer: Any, query: str, history: Any) -> Iterator[tuple[str, Any]]:
        drawn.append(torch.rand(1).item())
        yield query, history

    monkeypatch.setattr(fake_chat.Parrot, "stream_chat", stream_chat)
    for seed in ("1", "1", "2"):
        assert run("--prompt", "x", "--seed", seed).exit_code == 0
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("option", [("--temperature", "0.5"), ("--top-p", "0.5")], ids=" ".join)
def test_greedy_takes_no_sampling_options(run: Any, log: Path, option: tuple[str, str]) -> None:
    result = run("--prompt", "x", "--greedy", *option)
    assert (result.exit_code, log.exists()) == (2, False)
    assert "--greedy" in result.stderr


def test_an_error_in_a_pipe_is_told_and_the_next_line_answered(run: Any) -> None:
    for end in ("", "/stop\nnever\n"):
        result = run(stdin="fine\ntoo long\nnext\n" + end)
        assert (result.stdout, result.exit_code) == ("fine\nnext\n", 2)
        assert result.stderr == "glmquant: the prompt is too long.\n"
    assert run("--prompt", "too long").exit_code == 2


@pytest.mark.parametrize(("again", "stdout", "status"), [(0.0, "sl\nsl\nlast\n", 0), (60.0, "sl\nsl\n", 130)])
def test_ctrl_c_in_a_pipe(
    run: Any, monkeypatch: pytest.MonkeyPatch, again: float, stdout: str, status: int
) -> None:
    """Stops the answer, whose beginning is written; a second one within the given time ends the program."""

    def stream_chat(self: Any, tokenizer: Any, query: str, history: Any) -> Iterator[tuple[str, Any]]:
        yield query[:2], history
        if query.startswith("slow"):
            signal.raise_signal(signal.SIGINT)
        yield query, history

    monkeypatch.setattr(fake_chat.Parrot, "stream_chat", stream_chat)
    monkeypatch.setattr(chat_command, "_AGAIN", again)
    result = run(stdin="slow\nslower\nlast\n")
    assert (result.stdout, result.exit_code) == (stdout, status)
    assert result.stderr.startswith("glmquant: the answer was stopped.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("kind", "name"), [("chatglm", "ChatGLM-6B"), ("chatglm2", "ChatGLM2-6B")])
def test_an_instruction_for_a_model_without_a_system_role(
    run: Any, log: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(fake_chat.Tokenizer, "kind", kind)
    result = run("--prompt", "x", "--system", "Be brief.")
    assert (result.stdout, result.exit_code, log.exists()) == (
        "",
        2,
        False,
    )  # told before the model is loaded
    message = f"glmquant: {name} has no system role; say it in the first query.\n"
    assert result.stderr == message
    result = run(stdin="one\n/system Be brief.\ntwo\n")
    assert (result.stdout, result.stderr, result.exit_code) == ("one\ntwo\n", message, 2)
    assert [history for _, history, _ in logged(log, "asked")] == [[], [["one", "one"]]]


def test_bytes_that_are_no_utf_8(run: Any) -> None:
    assert run(stdin=b"ab\xff\n").stdout == "ab�\n"


def test_a_tool_call_is_shown(run: Any) -> None:
    assert run(stdin="tool\n").stdout == "weather\n{'city': 'Oslo'}\n"


def test_breaking_off_closes_the_stream_and_keeps_what_was_said(log: Path) -> None:
    conversation = Conversation(fake_chat.Parrot(), None)
    answer = conversation.ask("hello")
    assert [next(answer), next(answer)] == ["h", "he"]
    assert not logged(log, "ended")
    answer.close()
    assert logged(log, "ended")
    assert conversation.history == [("hello", "he")]


@pytest.mark.parametrize(
    ("grows", "written"),
    [
        (["a", "ab", "abc"], ["a", "b", "c", ""]),
        (["你好", "你好,", "你好，世"], ["你好", "", "，世", ""]),  # the mark changed when its neighbour came
        (["ab", "a", "ax"], ["ab", "\nax"]),  # not what any generation does, but the last word is told
        (["one\ntwo", "one\ntoo", "one\nthree"], ["one\ntwo", "\nthree"]),
        (["hi!"], ["hi", "!"]),
        ([], [""]),
    ],
    ids=["plain", "mark", "rewritten", "rewritten-line", "ends-in-a-mark", "nothing"],
)
def test_only_what_will_stay_is_written(grows: list[str], written: list[str]) -> None:
    pieces: list[str] = []
    show(grows, pieces.append)
    assert pieces == written


# On a terminal


@pytest.mark.parametrize(
    ("terminal", "answer"), [(True, "a[31mb\tc\nd"), (False, "a\x1b[31mb\tc\r\nd\x9b\x07")]
)
def test_a_terminal_gets_no_commands_from_the_model(
    terminal: bool, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(chat_command.click, "echo", lambda text="", **options: written.append(text))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    conversation = Conversation(fake_chat.Parrot(), None)
    reply(conversation, "a\x1b[31mb\tc\r\nd\x9b\x07")
    assert "".join(written) == answer
    written.clear()
    command(conversation, "/history")
    assert not re.search(r"[\x1b\r\x9b\x07]", "".join(written))


class Terminal:
    """A child process with a pseudo-terminal for all three streams, as a shell gives it."""

    def __init__(self, *args: str, delay: float = 0.0) -> None:
        import pty

        ours, theirs = pty.openpty()
        self.fd, self.seen = ours, ""
        self.process = subprocess.Popen(
            [sys.executable, fake_chat.__file__, "chat", "OUT", *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "FAKE_CHAT_DELAY": str(delay), "PYTHONUTF8": "1"},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ctrl_c_at_the_prompt(self, typed: str = "") -> None:
        """Not right after the prompt: between writing it and waiting for keys, Python is deaf to signals."""
        time.sleep(0.5)
        self.type(typed + "\x03")

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` has come since the last call; returns what came."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; got {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        came, _, self.seen = self.seen.partition(text)
        return came + text

    def ends(self) -> int:
        with contextlib.suppress(OSError):  # EIO: the other side was closed
            while piece := os.read(self.fd, 4096):
                self.seen += piece.decode(errors="replace")
        return self.process.wait(60)


def take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C typed there becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def terminal(*args: str, delay: float = 0.0) -> Iterator[Terminal]:
    opened = Terminal(*args, delay=delay)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.fd)


@needs_pty
def test_talking_on_a_terminal(log: Path) -> None:
    with terminal("--system", "Be kind.") as chat:
        chat.wait_for("You: ")
        for line, shown in [
            ("hello", "ChatGLM: hello"),
            ("/history", "assistant: hello"),
            ("/help", "/system TEXT"),
            ("too long", "glmquant: the prompt is too long."),
            ("again", "ChatGLM: again"),
            ("clear", "/help lists all commands"),
            ("dict x", "ChatGLM: dict x"),
            ("/history", "user: dict x\r\nassistant: dict x"),
            ("/system", "A new conversation."),
            ("", ""),
            ("last", "ChatGLM: last"),
        ]:
            chat.type(line + "\n")
            assert shown in chat.wait_for("You: "), line
        chat.type("stop\n")
        assert chat.ends() == 0
        assert "Traceback" not in chat.seen
    system = [{"role": "system", "content": "Be kind."}]
    said = [["hello", "hello"]]
    assert [history for _, history, _ in logged(log, "asked")] == [
        system,
        system + said,
        system + said,
        system,
        [],
    ]


@needs_pty
def test_answers_stream(log: Path) -> None:
    with terminal(delay=0.2) as chat:
        chat.wait_for("You: ")
        chat.type("abcdefgh\n")
        chat.wait_for("ChatGLM: abc")
        assert not logged(log, "ended"), "the whole answer came at once"
        chat.wait_for("You: ")


@needs_pty
def test_ctrl_c_stops_the_answer_and_not_the_program(log: Path) -> None:
    with terminal(delay=0.1) as chat:
        chat.wait_for("You: ")
        chat.type("x" * 600 + "\n")
        chat.wait_for("ChatGLM: xx")
        chat.type("\x03")
        assert "(stopped)" in chat.wait_for("You: ", seconds=10)
        assert len(logged(log, "ended")) == 1
        chat.type("ok\n")
        assert "ChatGLM: ok" in chat.wait_for("You: ")
        (query, answer), *_ = logged(log, "asked")[1][1]
        assert query.startswith(answer)
        assert 2 <= len(answer) < 600
        chat.type("\x04")
        assert chat.ends() == 0


@needs_pty
def test_ctrl_c_twice_at_the_prompt_leaves(log: Path) -> None:
    with terminal() as chat:
        chat.wait_for("You: ")
        chat.ctrl_c_at_the_prompt("half a lin")
        assert "once more" in chat.wait_for("You: ")
        chat.type("hello\n")  # in between, so the next one warns again
        chat.wait_for("You: ")
        chat.ctrl_c_at_the_prompt()
        assert "once more" in chat.wait_for("You: ")
        chat.ctrl_c_at_the_prompt()
        assert chat.ends() == 0
        assert "Traceback" not in chat.seen
    assert [query for query, *_ in logged(log, "asked")] == ["hello"]


@needs_pty
def test_one_answer_streams_on_a_terminal_and_ctrl_c_ends_it(log: Path) -> None:
    with terminal("--prompt", "y" * 300, delay=0.1) as chat:
        assert "You:" not in chat.wait_for("yy")
        chat.type("\x03")
        assert chat.ends() == 130
        assert re.search(r"glmquant: interrupted\.", chat.seen)
        assert logged(log, "ended")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from glmquant.cli import main;"
        "r = CliRunner().invoke(main, ['chat', '--help']); assert r.exit_code == 0, r.output;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
