"""The command line as a process: terminals, completion, imports; and the public names of the package."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_convert import CLI, config, run_cli, small_source, tensors, write_source

import glmquant
from glmquant.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model", layers=6, hidden=256, ffn=512)


# Terminals


def on_terminal(*args: object, **environment: str) -> tuple[int, str, str]:
    """Run with stderr a terminal of 24 x 100; returns exit status, stdout and all that the terminal got."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    unset = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.Popen(
        [*CLI, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**kept, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment},
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side was closed
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, seen.decode()


needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@needs_pty
def test_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    status, stdout, seen = on_terminal("convert", source, tmp_path / "out")
    assert status == 0
    assert "converting" in seen
    assert "━" in seen
    assert "%" not in seen  # the lines for logs are not printed too
    assert COLOUR.search(seen)
    # Left as it was found: the cursor is shown, colours are off, the last line is empty.
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l") >= 0
    assert COLOUR.findall(seen)[-1] in ("\x1b[0m", "\x1b[m", "\x1b[39m")
    assert screen(seen) == ""
    assert "\x1b" not in stdout
    assert stdout.splitlines()[-1].startswith("error")


def screen(seen: str) -> str:
    """What is left to read after a terminal has obeyed: erased lines, carriage returns, cursor up."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", seen):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row = max(0, row - int(token[2:-1] or 1))
        elif token.endswith("K") and token.startswith("\x1b"):
            lines[row] = "" if token == "\x1b[2K" else lines[row][:column]
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return "\n".join(lines).strip()


@needs_pty
def test_no_color(source: Path, tmp_path: Path) -> None:
    status, _, seen = on_terminal("convert", source, tmp_path / "out", NO_COLOR="1")
    assert status == 0
    assert "━" in seen
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-8]|4[0-8]|9[0-7])\b[0-9;]*m", seen)


@needs_pty
def test_terminal_that_can_do_nothing(source: Path, tmp_path: Path) -> None:
    status, _, seen = on_terminal("convert", source, tmp_path / "out", TERM="dumb")
    assert status == 0
    assert "\x1b" not in seen


@needs_pty
def test_json_is_silent_on_a_terminal(source: Path, tmp_path: Path) -> None:
    status, stdout, seen = on_terminal("convert", source, tmp_path / "out", "--json")
    assert (status, seen) == (0, "")
    assert json.loads(stdout)["model"]


@needs_pty
def test_error_in_mid_work_leaves_a_clean_terminal(tmp_path: Path) -> None:
    sizes = config(layers=6, hidden=256, ffn=512)
    made = tensors(sizes)
    made["transformer.encoder.layers.5.mlp.dense_4h_to_h.weight"][7, 7] = float("nan")
    source = write_source(tmp_path / "model", made, sizes)
    status, stdout, seen = on_terminal("convert", source, tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert "converting" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l") >= 0
    left = screen(seen)
    assert left.startswith(
        "glmquant: transformer.encoder.layers.5.mlp.dense_4h_to_h.weight cannot be converted"
    )
    assert "converting" not in left


def test_pipe_that_closes_early(source: Path) -> None:
    """`glmquant inspect ... | head -0` ends without a word."""
    process = subprocess.Popen(
        [*CLI, "inspect", str(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    process.stderr.close()


def test_interrupt_that_native_code_turns_into_something_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors calls back into Python, and makes a ValueError of the KeyboardInterrupt it gets there."""

    def read(*args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of an object") from None

    monkeypatch.setattr("glmquant._quantize.run", read)
    before = signal.getsignal(signal.SIGINT)
    command = ["convert", str(source), str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 130
    assert re.fullmatch(r"glmquant: interrupted; OUT is as it was, .*\.\n", result.stderr)
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    shown = run_cli("--install-completion")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"_GLMQUANT_COMPLETE={shell}_source glmquant" in shown.stdout
    script = Path(sys.executable).with_name("glmquant")
    if not script.exists():
        pytest.skip("not installed as a script")
    words = {
        "bash": {"COMP_WORDS": "glmquant convert --met", "COMP_CWORD": "2"},
        "zsh": {"COMP_WORDS": "glmquant convert --met", "COMP_CWORD": "2"},
        "fish": {"COMP_WORDS": "glmquant convert --met", "COMP_CWORD": "--met"},
    }[shell]
    if shell != "bash":  # click's bash script wants a recent bash, which not every machine has
        made = subprocess.run(
            [script],
            capture_output=True,
            text=True,
            env=os.environ | {"_GLMQUANT_COMPLETE": f"{shell}_source"},
        )
        assert "_GLMQUANT_COMPLETE" in made.stdout
    completed = subprocess.run(
        [script],
        capture_output=True,
        text=True,
        env=os.environ | words | {"_GLMQUANT_COMPLETE": f"{shell}_complete"},
    )
    assert "--method" in completed.stdout
    assert "--bits" not in completed.stdout


# Light to import


HEAVY = ["torch", "transformers", "safetensors", "numpy", "rich", "tokenizers"]


@pytest.mark.parametrize(
    "code",
    [
        "import glmquant",
        "import glmquant; glmquant.Recipe(), glmquant.Scheme(4), glmquant.GlmquantError, dir(glmquant)",
        "import glmquant.cli",
        "from glmquant.cli import main; main(['--help'], standalone_mode=False)",
        "from glmquant.cli import main; main(['convert', '--help'], standalone_mode=False)",
        "import os; os.environ.update(_GLMQUANT_COMPLETE='zsh_complete', COMP_WORDS='glmquant c', COMP_CWORD='1')\n"
        "from glmquant.cli import main\n"
        "try: main(prog_name='glmquant')\n"
        "except SystemExit: pass",
    ],
    ids=["import", "names", "cli", "help", "command help", "completion"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    check = f"import sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_inspect_does_not_need_transformers(source: Path) -> None:
    code = (
        f"import glmquant, sys; glmquant.inspect({str(source)!r}); "
        "print([name for name in ('transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


# Public names


def test_public_names() -> None:
    assert sorted(glmquant.__all__) == glmquant.__dir__() == dir(glmquant)
    assert len(set(glmquant.__all__)) == len(glmquant.__all__)
    for name in glmquant.__all__:
        assert getattr(glmquant, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        glmquant.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        exec("from glmquant import nonsense")


@pytest.mark.parametrize("name", [name for name in glmquant.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(glmquant, name)
    assert value.__module__.startswith("glmquant.")
    assert value.__doc__ is not None
    assert not value.__doc__.startswith(f"{name}("), (
        "the signature that dataclasses put there is no docstring"
    )
    if not inspect.isclass(value):
        return
    for member, part in vars(value).items():
        if not member.startswith("_") and (inspect.isfunction(part) or isinstance(part, property)):
            assert inspect.getdoc(part), f"{name}.{member}"


def test_errors_are_one_tree() -> None:
    errors = [getattr(glmquant, name) for name in glmquant.__all__ if name.endswith("Error")]
    assert len(errors) == 12
    assert all(issubclass(error, glmquant.GlmquantError) for error in errors)
    noes = {"VerificationError": 1, "DoesNotFitError": 1, "ModelError": 1}
    assert {error.__name__: error.exit_status for error in errors if error.exit_status != 2} == noes
