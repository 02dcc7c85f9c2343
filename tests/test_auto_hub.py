"""`import glmquant.auto` and models by their names on a hub: the cards work, and no code of a repository runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_cards import MARK, published
from helpers_hub import client_environment
from hub import HubServer

TRY = """
import json
def attempt(what):
    try:
        return type(what()).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return published(tmp_path / "published", "chatglm3-6b")


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def run(program: str, server: HubServer, tmp_path: Path) -> Any:
    """Run `program` in a process that knows only this hub; returns its last line, as JSON."""
    environment = {**os.environ, **client_environment(server, tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRY + program],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("option", ["", ", revision='old'"])
def test_the_card_runs_from_a_hub(server: HubServer, folder: Path, tmp_path: Path, option: str) -> None:
    repository = server.add("THUDM/chatglm3-6b")
    repository.branches["old"] = repository.commit_folder(folder)
    program = f"""
import glmquant.auto
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True{option})
model = AutoModel.from_pretrained("THUDM/chatglm3-6b", trust_remote_code=True{option}).float()
response, history = model.chat(tokenizer, "你好", history=[])
print(json.dumps([type(tokenizer).__name__, len(history), tokenizer("你好")["input_ids"][:2]]))
"""
    name, turns, start = run(program, server, tmp_path)
    assert (name, turns) == ("ChatGLM3Tokenizer", 2)
    assert len(start) == 2
    assert not (folder / MARK).exists()


def test_code_of_a_repository_is_never_run(server: HubServer, folder: Path, tmp_path: Path) -> None:
    """A tokenizer class that nobody registered, asked for in every way: transformers would run its code."""
    repository = server.add("org/model")
    good = repository.commit_folder(folder)
    change(
        folder / "config.json",
        custom_pipelines={"chat": {"impl": "modeling_chatglm.ChatGLMConfig", "pt": []}},
    )
    classify = {"AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    change(folder / "config.json", auto_map=classify)
    for name, fields in (
        ("unknown", {"tokenizer_class": "FooTokenizer"}),
        ("unnamed", {"tokenizer_class": None}),
    ):
        change(folder / "tokenizer_config.json", **fields)
        repository.branches[name] = repository.commit_folder(folder)
    repository.branches["main"] = good
    program = f"""
import glmquant.auto
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
found = {{}}
for revision in ("unknown", "unnamed", {repository.branches["unknown"]!r}):
    for options in ({{}}, {{"config": AutoConfig.from_pretrained("org/model")}}, {{"cache_dir": "another"}}):
        found[f"tokenizer {{revision}} {{list(options)}}"] = attempt(lambda: AutoTokenizer.from_pretrained(
            "org/model", trust_remote_code=True, revision=revision, **options))
options = {{"trust_remote_code": True, "revision": "unknown"}}
found["good"] = attempt(lambda: AutoTokenizer.from_pretrained("org/model", trust_remote_code=True))
found["config"] = attempt(lambda: AutoConfig.from_pretrained("org/model", **options))
found["model"] = attempt(lambda: AutoModel.from_pretrained("org/model", **options))
found["class"] = attempt(lambda: AutoModelForSequenceClassification.from_pretrained("org/model", **options))
found["pipeline"] = attempt(lambda: pipeline("chat", "org/model", **options))
print(json.dumps(found))
"""
    found = run(program, server, tmp_path)
    assert not (folder / MARK).exists(), found
    refused = [found.pop(key) for key in list(found) if key.startswith("tokenizer")]
    assert len(refused) == 9
    assert all("UnsafeFileError" in text and "load_tokenizer" in text for text in refused)
    assert [found[key] for key in ("good", "config")] == ["ChatGLM3Tokenizer", "ChatGLMConfig"]
    assert found["model"] == "GlmForCausalLM"
    assert "Unrecognized configuration class" in found["class"]


def test_what_is_no_chatglm_is_left_to_transformers(server: HubServer, folder: Path, tmp_path: Path) -> None:
    """The tests above would pass, too, if the planted code could not run at all."""
    change(folder / "config.json", model_type="gpt2", auto_map={})
    change(folder / "tokenizer_config.json", tokenizer_class="FooTokenizer")
    server.add("org/model").commit_folder(folder)
    program = """
import glmquant.auto
from transformers import AutoTokenizer
print(json.dumps(attempt(lambda: AutoTokenizer.from_pretrained("org/model", trust_remote_code=True))))
"""
    run(program, server, tmp_path)
    assert (folder / MARK).exists()
