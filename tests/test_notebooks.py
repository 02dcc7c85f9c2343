"""The notebooks run, cell by cell; those about clients, against a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_serve import listening, real_service

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run every cell; returns what they define."""
    path = NOTEBOOKS / f"{name}.ipynb"
    monkeypatch.chdir(NOTEBOOKS)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources
    scope: dict[str, Any] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"{path.name}:{number}", "exec"), scope)
    return scope


def test_all_are_run_here() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {
        "quickstart", "langchain_chatglm3", "langchain_chatglm"
    }  # fmt: skip


def test_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLMQUANT_OUT", str(tmp_path / "out"))
    scope = run("quickstart", monkeypatch)
    assert scope["checked"].ok
    assert type(scope["model"]).__name__ == "GlmForCausalLM"
    assert scope["fits"].ok
    assert [result["error"] for result in scope["found"]["results"]] == [None]
    assert "tok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("notebook", "model"),
    [
        ("langchain_chatglm3", "chatglm3-6b"),
        ("langchain_chatglm", "chatglm-6b"),
        ("langchain_chatglm", "chatglm2-6b"),
    ],
)
def test_langchain(notebook: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_community", reason="langchain-community is not installed")
    with listening(real_service(model)) as address:
        monkeypatch.setenv("GLMQUANT_SERVER", address)
        scope = run(notebook, monkeypatch)
    assert isinstance(scope["answer"], str)
    assert isinstance(scope["piped"], str)
    if notebook == "langchain_chatglm3":
        assert scope["llm"].max_tokens == 80000
    else:
        assert scope["llm"].max_token == 80000
