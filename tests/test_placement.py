"""Device maps and offloading by accelerate, and LoRA adapters beside a base.

There is one CPU here: what is tested is that maps are followed, that packed layers are offloaded and come back, and
that the result is the same. Several GPUs are not tested.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapter import lora, original_weights, train
from helpers_models import golden, greedy
from helpers_sources import CHATGLM2, random_tensors, write_model
from peft import PeftModel, get_peft_model

import glmquant
from glmquant import Recipe, UsageError
from glmquant.models.quantized import QuantizedLinear

IDS = (torch.arange(12)[None] * 7 + 3) % 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "16-bit": write_model(
            root / "plain", {**CHATGLM2, "torch_dtype": "bfloat16"}, random_tensors(CHATGLM2)
        )
    }
    recipes = {
        "int4": Recipe(symmetric=False, group_size=64),
        "ends": Recipe(quantize_embeddings=True, quantize_head=True),
    }
    for name, recipe in recipes.items():
        glmquant.convert(folders["16-bit"], root / name, recipe)
        folders[name] = root / name
    return folders


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", ["16-bit", "int4", "ends"])
def test_layers_on_the_disk_come_back_for_their_turn(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    plain = glmquant.load(folders[kind], device="cpu")
    model = glmquant.load(folders[kind], device_map=spread, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(plain))
    layer = model.model.layers[1].mlp.down_proj
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert isinstance(layer, QuantizedLinear) == (kind != "16-bit")
    assert model.hf_device_map["model.layers.1"] == "disk"
    assert torch.equal(greedy(model, IDS, max_new_tokens=4), greedy(plain, IDS, max_new_tokens=4))
    if kind == "16-bit":
        with pytest.raises(UsageError, match="device_map"):
            model.quantize(4)


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}], ids=str)
def test_a_map_that_ends_on_one_device(folders: dict[str, Path], strategy: Any) -> None:
    model = glmquant.load(folders["int4"], device_map=strategy)
    assert model.device.type == ("cuda" if strategy == "auto" and torch.cuda.is_available() else "cpu")
    assert torch.equal(logits(model), logits(glmquant.load(folders["int4"], device="cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="limits below are for a machine without a GPU")
def test_limits_of_memory_send_the_rest_to_the_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    model = glmquant.load(
        folders["int4"],
        device_map="sequential",
        max_memory={"cpu": "300KB"},
        offload_folder=tmp_path / "offload",
    )
    assert set(map(str, model.hf_device_map.values())) == {"cpu", "disk"}
    assert torch.equal(logits(model), logits(glmquant.load(folders["int4"], device="cpu")))


def test_tied_weights_of_chatglm_6b_on_the_disk(tmp_path: Path) -> None:
    for name in ("chatglm-6b/tiny-3l", "chatglm-6b/tiny-3l-int4-embeddings"):
        folder = golden(name)
        plain = glmquant.load(folder, device="cpu", dtype=torch.float32)
        spread = {"transformer": "disk", "lm_head": "disk"}
        model = glmquant.load(folder, dtype="float32", device_map=spread, offload_folder=tmp_path / "offload")
        ids = torch.tensor([[7, 8, 9, plain.config.gmask_token_id, plain.config.bos_token_id]])
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, plain(ids).logits)


def test_nothing_is_offloaded_into_the_checkpoint(folders: dict[str, Path]) -> None:
    inside = folders["int4"] / "offload"
    with pytest.raises(UsageError, match="inside the checkpoint"):
        glmquant.load(folders["int4"], device_map={"": "disk"}, offload_folder=inside)
    assert not inside.exists()


@pytest.mark.parametrize("device_map", ["auto", {"": "disk"}, {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_without_accelerate_the_message_says_what_to_install(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: Any
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UsageError, match=r"pip install 'glmquant\[offload\]'"):
        glmquant.load(folders["int4"], device_map=device_map, offload_folder=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    glmquant.load(folders["int4"], device="cpu")
    glmquant.load(folders["int4"], device_map={"": "cpu"})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained on THUDM's fused tensors."""
    from helpers_adapter import skeleton

    folder = tmp_path_factory.mktemp("adapter") / "lora"
    train(skeleton(original_weights()), lora(), folder)
    return folder


def test_a_lora_of_thudms_model_is_merged_while_loading(
    folders: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    glmquant.convert(folders["16-bit"], tmp_path / "merged", Recipe(bits=16), adapter=adapter)
    wanted = glmquant.load(tmp_path / "merged", device="cpu", dtype=torch.float32)
    model = glmquant.load(folders["16-bit"], device="cpu", dtype=torch.float32, adapter=adapter)
    assert torch.equal(logits(model), logits(wanted))
    plain = glmquant.load(folders["16-bit"], device="cpu", dtype=torch.float32)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    model.quantize(4)


def test_a_lora_of_the_native_layout_loads_with_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    base = glmquant.load(folders["16-bit"], device="cpu", dtype=torch.float32)
    targets = ["q_proj", "v_proj", "gate_up_proj", "down_proj"]
    trained = get_peft_model(base, lora(target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    trained.save_pretrained(tmp_path / "lora")
    wanted = logits(trained)
    loaded = glmquant.load(folders["16-bit"], device="cpu", dtype=torch.float32)
    beside = PeftModel.from_pretrained(loaded, tmp_path / "lora")
    torch.testing.assert_close(logits(beside), wanted, rtol=1e-5, atol=1e-5)
    merged = glmquant.load(folders["16-bit"], device="cpu", dtype=torch.float32, adapter=tmp_path / "lora")
    torch.testing.assert_close(
        logits(merged), wanted, rtol=2e-2, atol=2e-2
    )  # merged weights are rounded to half
    assert torch.equal(greedy(beside, IDS, max_new_tokens=3)[:, :12], IDS)


def test_an_adapter_is_not_merged_into_packed_weights(folders: dict[str, Path], adapter: Path) -> None:
    with pytest.raises(UsageError, match="16-bit base"):
        glmquant.load(folders["int4"], device="cpu", adapter=adapter)
