"""A LoRA that lies in the folder that is loaded: beside the base, or alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapter import lora, original_weights, skeleton, train
from helpers_sources import tiny_model
from transformers import AutoModel

import glmquant
import glmquant.auto
from glmquant import Recipe, SourceError, UsageError

IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    train(skeleton(original_weights()), lora(), folder)
    return folder


@pytest.fixture
def adapter(lora_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_folder, tmp_path / "lora"))


def named(adapter: Path, base: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return adapter


@torch.inference_mode()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    found: torch.Tensor = glmquant.load(folder, device="cpu", **options)(IDS).logits
    return found


def test_one_beside_the_base_is_merged_as_auto_model_does(adapter: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    plain, wanted = logits(base), logits(base, adapter=adapter)
    assert not torch.equal(plain, wanted)
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    assert torch.equal(logits(base), wanted)
    with torch.inference_mode():
        assert torch.equal(AutoModel.from_pretrained(base)(IDS).logits, wanted)


def test_the_one_that_is_asked_for_goes_before(adapter: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    other = tmp_path / "other"
    train(skeleton(original_weights()), lora(), other, seed=4)
    wanted = logits(base, adapter=other)
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    assert torch.equal(logits(base, adapter=other), wanted)


@pytest.mark.parametrize("recipe", [Recipe(group_size=64), Recipe(format="cpm")], ids=["native", "cpm"])
def test_beside_a_quantized_base_it_is_refused(adapter: Path, tmp_path: Path, recipe: Recipe) -> None:
    glmquant.convert(tiny_model(tmp_path), tmp_path / "out", recipe)
    shutil.copytree(adapter, tmp_path / "out", dirs_exist_ok=True)
    with pytest.raises(UsageError, match=r"is quantized .*move adapter_config.json away\)\.$"):
        glmquant.load(tmp_path / "out", device="cpu")


def test_the_folder_of_an_adapter_loads_with_the_base_that_it_names(adapter: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path)
    assert torch.equal(logits(named(adapter, str(base))), logits(base, adapter=adapter))


@pytest.mark.parametrize("base", ["THUDM/chatglm3-6b", "/gone", "", None, 5])
def test_without_its_base_the_message_says_how_to_give_one(adapter: Path, base: Any) -> None:
    with pytest.raises(SourceError) as caught:
        glmquant.load(named(adapter, base), device="cpu")
    assert f"glmquant.load(BASE, adapter={str(adapter)!r})" in str(caught.value)
    assert repr(base) in str(caught.value)
