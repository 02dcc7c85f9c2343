"""What a calibrated conversion tells while it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers_sources import CHATGLM2, write_model
from rich.console import Console
from test_evaluate import TEXT, opinionated
from test_original_tokenizers_tiny import sentencepiece_folder

from glmquant import cli
from glmquant._pace import Pace
from glmquant.cli.terminal import progress_bar


def test_the_rest_is_estimated_from_the_blocks_of_this_run() -> None:
    now = 0.0
    told: list[str] = []
    pace = Pace(5, told.append, lambda: now)
    for block, seconds in ((1, 4000.0), (2, 2000.0), (3, 30.0)):  # block 0 was done by an earlier run
        now += 1
        pace.begin(block)
        pace("first")
        now += seconds
        pace("second")
        pace.end()
    assert told == [
        "block 2 of 5: first",
        "block 2 of 5: second",
        "block 3 of 5: first, about 3 h 20 min left",  # three of 4000 s
        "block 3 of 5: second, about 2 h 47 min left",
        "block 4 of 5: first, about 1 h 40 min left",  # two of 3000 s
        "block 4 of 5: second, about 1 h 40 min left",
    ]
    now += 10_000
    pace("third")
    assert told[-1] == "block 4 of 5: third, about 0 s left"


def test_every_layer_of_every_block_is_told(tmp_path: Path) -> None:
    source = sentencepiece_folder(tmp_path / "source", "chatglm3-6b")
    config = {**CHATGLM2, "padded_vocab_size": 512}
    write_model(source, config, opinionated(config))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--method", "gptq", "--calibration", str(tmp_path / "text.txt"), "--calibration-windows", "2"]
    result = CliRunner().invoke(cli.main, ["convert", str(source), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    told = re.findall(r"^converting: block (\d) of 2: (\S+) (\S+?)(,.*)?$", result.stderr, re.M)
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert [
        (block, name) for block, what, name, _ in told if what == "calibrating"
    ] == [
        (str(layer + 1), f"model.layers.{layer}.{name}") for layer in range(2) for name in names
    ]  # fmt: skip
    assert all(
        bool(re.fullmatch(r", about .* left", rest)) == (block == "2") for block, _, _, rest in told[1:]
    )


def test_a_terminal_shows_one_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the blocks, in place of one by bytes."""
    consoles: list[Console] = []

    def console(**options: object) -> Console:
        consoles.append(Console(force_terminal=True, record=True, width=120, height=20))
        return consoles[0]

    monkeypatch.setattr("rich.console.Console", console)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    text = "block 2 of 9: calibrating x, about 3 h left"
    for name, estimates in ((text, 0), ("x", 1)):
        consoles.clear()
        with progress_bar("converting", quiet=False) as progress:
            assert progress is not None
            progress(10, 100, name)
        shown = consoles[0].export_text()
        assert name in shown
        assert len(re.findall(r"-:--:--|\d:\d\d:\d\d", shown)) == estimates
