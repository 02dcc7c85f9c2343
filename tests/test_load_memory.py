"""Memory while loading: the weights as they are stored, and no more than one tensor beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_sources import CHATGLM2, random_tensors, write_bin, write_model
from safetensors.torch import load_file

import glmquant
from glmquant import Recipe

CONFIG = {
    **CHATGLM2, "num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 2048, "kv_channels": 64,
    "num_attention_heads": 12, "padded_vocab_size": 32000, "torch_dtype": "bfloat16",
}  # fmt: skip

PROGRAM = """
import json, re, sys, threading, time
import torch, transformers.generation, glmquant.models.loading, glmquant.models.glm
transformers.GenerationConfig()
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
glmquant.load(sys.argv[2], device="cpu")  # what imports and first calls cost is not the question
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
model = glmquant.load(sys.argv[1], device="cpu")
done.set(); watcher.join()
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"weights": weights, "peak": peak - before, "after": anonymous() - before}))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tensors = random_tensors(CONFIG, torch.bfloat16)
    folders = {
        "16-bit": write_model(root / "plain", CONFIG, tensors),
        "tiny": write_model(root / "tiny", CHATGLM2, random_tensors(CHATGLM2)),
    }
    recipes = {
        "int4": Recipe(),
        "int4-asymmetric": Recipe(symmetric=False),
        "int8-ends": Recipe(bits=8, quantize_head=True, quantize_embeddings=True),
        "int4-cpm": Recipe(format="cpm"),
    }
    for name, recipe in recipes.items():
        glmquant.convert(folders["16-bit"], root / name, recipe)
        folders[name] = root / name
    for name, source in (("16-bit-bin", "16-bit"), ("int4-bin", "int4-cpm")):  # the form THUDM published
        config = json.loads((folders[source] / "config.json").read_text())
        folders[name] = write_bin(root / name, config, load_file(folders[source] / "model.safetensors"))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["16-bit", "16-bit-bin", "int4", "int4-asymmetric", "int8-ends", "int4-cpm", "int4-bin"]
)
def test_the_peak_is_the_packed_weights_and_a_little(models: dict[str, Path], kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(models[kind]), str(models["tiny"])]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    embedding = 32000 * 768 * 2  # the largest tensor in 16 bit
    assert result["weights"] <= sum(f.stat().st_size for f in models[kind].glob("*model*")) * 1.01
    assert result["peak"] <= result["weights"] + embedding // 2, result
