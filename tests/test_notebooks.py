"""The notebooks run, cell by cell."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("GLMQUANT_OUT", str(tmp_path / "out"))
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources
    scope: dict[str, object] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"{path.name}:{number}", "exec"), scope)
    assert scope["checked"].ok
    assert type(scope["model"]).__name__ == "GlmForCausalLM"
