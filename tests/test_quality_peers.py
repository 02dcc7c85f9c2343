"""`benchmarks.quality_peers`: what is handed to other projects' quantizers, and what is made of what comes back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from helpers_convert import small_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

import glmquant
from benchmarks import quality, quality_llama, quality_peers
from benchmarks.quality_peers import PEERS, Missing, Peer
from glmquant import Recipe
from tests.engines.environments import Environment, EnvironmentFailed


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("peers")
    small_source(folder / "source")
    glmquant.convert(folder / "source", folder / "native", Recipe(bits=16), device="cpu")
    save_file({"ids": torch.arange(64).view(2, 32)}, folder / "windows.safetensors")
    return SimpleNamespace(native=folder / "native", windows=folder / "windows.safetensors", folder=folder)


def test_what_a_worker_gives_is_a_checkpoint(given: SimpleNamespace, tmp_path: Path) -> None:
    cost = quality_peers.make("llama.cpp Q4_0 (gguf)", given, tmp_path / "out")
    assert cost["linear_bits"] == 4.5
    assert cost["peak_anonymous_mib"] > 10
    before, after = (load_file(folder / "model.safetensors") for folder in (given.native, tmp_path / "out"))
    assert before.keys() == after.keys()
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            exact = gguf.dequantize(gguf.quantize(weight.float().numpy(), kind), kind)
            assert after[name].equal(torch.from_numpy(exact).half()), name
        else:
            assert after[name].equal(weight), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not list(given.folder.glob("*.work"))


def test_a_peer_that_fails_says_why(
    given: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: Environment, say: object) -> None:
        raise EnvironmentFailed("pip install: no such package")

    monkeypatch.setattr(Environment, "ensure", offline)
    with pytest.raises(Missing, match="no such package"):
        quality_peers.make("hqq, g64, asymmetric", given, tmp_path / "out")
    monkeypatch.setitem(PEERS, "wrong", Peer("gguf", 4.5, {"kind": "Q4_9"}))
    with pytest.raises(Missing, match="Q4_9"):
        quality_peers.make("wrong", given, tmp_path / "out")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Missing, match="llama-imatrix is not on PATH"):
        quality_peers.make("llama.cpp Q4_K_M, imatrix", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_in_the_results(tmp_path: Path) -> None:
    windows = {"same kind": [6, 512, "0123"]}
    trials = {"auto-round, g64": {"recipe": "auto-round, g64", "missing": "no such package"}}
    quality._save(tmp_path / "quality.json", windows, trials)
    found = json.loads((tmp_path / "quality.json").read_text())["trials"]
    assert {trial["recipe"]: trial["missing"] for trial in found} == {
        **dict.fromkeys(PEERS, "was not asked for"),
        "auto-round, g64": "no such package",
    }
    assert quality._kept(tmp_path / "quality.json", windows) == {}  # and tried again


def test_llama_turns_what_glm_turns(given: SimpleNamespace, tmp_path: Path) -> None:
    """The file for ``llama-imatrix``: its positions are those of transformers' model, its matrices the same rows."""
    quality_llama.write(given.native, tmp_path / "f16.gguf")
    reader = gguf.GGUFReader(tmp_path / "f16.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    config = AutoModelForCausalLM.from_pretrained(given.native).config
    wanted = GlmRotaryEmbedding(config).inv_freq
    base = reader.fields["llama.rope.freq_base"].contents()
    half = config.head_dim // 2
    turned = base ** (-torch.arange(half) / half) / torch.from_numpy(stored["rope_freqs.weight"].copy())
    assert turned[: len(wanted)] == pytest.approx(wanted, rel=1e-5)
    assert turned[len(wanted) :].max() * config.max_position_embeddings < 1e-20
    weights = load_file(given.native / "model.safetensors")
    fused = weights["model.layers.1.mlp.gate_up_proj.weight"].numpy()
    assert (stored["blk.1.ffn_gate.weight"] == fused[: len(fused) // 2]).all()
    assert (stored["blk.1.ffn_up.weight"] == fused[len(fused) // 2 :]).all()
    assert (stored["output.weight"] == weights["lm_head.weight"].numpy()).all()


@pytest.mark.skipif(sys.platform != "linux", reason="runs shell scripts")
def test_llama_programs_are_asked_for_windows_by_their_ids(
    given: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With programs that stand in for the real ones: the text is the ids, and the file's own types count."""
    programs = {
        "llama-imatrix": 'while [ "$1" != -f ]; do shift; done; cp "$2" "$(dirname "$2")/seen.txt"',
        "llama-quantize": 'cp "$7" "$8"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cost = quality_peers.make("llama.cpp Q4_K_M, imatrix", given, tmp_path / "out")
    assert cost["linear_bits"] == 16  # for what was copied is F16
    seen = (given.folder / "llama.cpp" / "seen.txt").read_text()
    vocabulary = gguf.GGUFReader(given.folder / "llama.cpp" / "f16.gguf").fields["tokenizer.ggml.tokens"]
    assert seen == "".join(vocabulary.contents(token) for token in range(64))
    before, after = (load_file(folder / "model.safetensors") for folder in (given.native, tmp_path / "out"))
    assert all(after[name].equal(weight) for name, weight in before.items())
