"""Models whose head is the embedding, and whose checkpoints therefore need not store it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmConfig, GlmForCausalLM

import glmquant
from glmquant import Recipe, UsageError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def tied_glm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, dtype=torch.float16,
    )  # fmt: skip
    folder = tmp_path / "tied"
    GlmForCausalLM(config).half().save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


def test_a_tied_glm_loads_and_verifies(tied_glm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    glmquant.convert(tied_glm, out, Recipe(group_size=32))
    assert glmquant.verify(out, tied_glm).ok
    model = GlmForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = GlmForCausalLM.from_pretrained(tied_glm, dtype=torch.float32)
    ids = torch.arange(2, 20)[None]
    with torch.inference_mode():
        ours, theirs = model(ids).logits, original(ids).logits
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("end", ["quantize_head", "quantize_embeddings"])
def test_the_ends_of_a_tied_glm_stay(tied_glm: Path, tmp_path: Path, end: str) -> None:
    with pytest.raises(UsageError, match="no output head of its own"):
        glmquant.convert(tied_glm, tmp_path / "out", Recipe(group_size=32, **{end: True}))


def test_chatglm_6b_without_a_stored_head_quantizes_its_embedding_for_both(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    golden = GOLDEN / "chatglm-6b" / "tiny-3l"
    weights = load_file(golden / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text((golden / "config.json").read_text())
    out = tmp_path / "out"
    glmquant.convert(source, out, Recipe(format="cpm", quantize_embeddings=True))
    stored = load_file(out / "model.safetensors")
    expected = load_file(GOLDEN / "chatglm-6b" / "tiny-3l-int4-embeddings" / "model.safetensors")
    for name in ("lm_head.weight", "lm_head.weight_scale", "transformer.word_embeddings.weight"):
        assert torch.equal(stored[name], expected[name]), name
    assert glmquant.verify(out, source).ok
    assert json.loads((out / "config.json").read_text())["quantization_embeddings"] is True
    glmquant.convert(out, tmp_path / "again", Recipe(format="cpm", bits=8))


def test_a_dtype_stated_the_new_way_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    golden = GOLDEN / "glm-4-9b-chat" / "tiny" / "safetensors-bf16"
    for path in golden.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(config))
    glmquant.convert(source, tmp_path / "out", Recipe(group_size="row"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert glmquant.verify(tmp_path / "out", source).ok
