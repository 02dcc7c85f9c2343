"""Folders as THUDM published them, but tiny: the vocabulary, config.json and code, and random weights.

The vocabulary is the published one where it lies beside the repository, else a small one of its kind.

The code in them must never run: each file leaves a mark when it does. The weights are such that answers end after a
few tokens, as chat() with its long limits needs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers_models import REPOSITORY, SHARED
from helpers_sources import random_tensors, write_model
from helpers_tokenizers import configure, train, write_ranks

import glmquant
from glmquant._folders import cache_folder
from glmquant.prompts import prompt_for

CONFIGS = REPOSITORY / "tests/golden/published-configs"
SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
FIRST: dict[str, Any] = {**SMALL, "inner_hidden_size": 128}
LATER: dict[str, Any] = {**SMALL, "kv_channels": 32, "ffn_hidden_size": 128, "multi_query_group_num": 1}
# model -> (folder of its vocabulary, id at which an answer ends)
MODELS = {
    "chatglm-6b": ("chatglm-6b", 130005),
    "chatglm2-6b": ("chatglm2-6b", 2),
    "chatglm3-6b": ("chatglm3-6b", 2),
    "chatglm3-6b-32k": ("chatglm3-6b", 2),
    "glm-4-9b-chat": ("glm-4-9b-chat", 151336),
}
MARK = "code-of-the-folder-was-run"


def published(root: Path, model: str) -> Path:
    """Write the folder of `model` below `root`."""
    vocabulary, stop = MODELS[model]
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    first = model == "chatglm-6b"
    config.update(FIRST if first else LATER)
    if "num_hidden_layers" in config:
        config["num_hidden_layers"] = config["num_layers"]
    folder = root / model
    if (SHARED / "tokenizers" / vocabulary).is_dir():
        shutil.copytree(SHARED / "tokenizers" / vocabulary, folder)
    else:
        stop = _small_vocabulary(folder, model, config)
    write_model(folder, config, _weights(config, stop, first))
    generation = CONFIGS / f"{model}.generation_config.json"
    if generation.exists() and stop == MODELS[model][1]:
        shutil.copy(generation, folder / "generation_config.json")
    plant_code(folder)
    return folder


def _small_vocabulary(folder: Path, model: str, config: dict[str, Any]) -> int:
    """Make a tokenizer of the model's kind, and let `config` have its rows and ids; returns where answers end."""
    if model == "glm-4-9b-chat":
        folder.mkdir()
        write_ranks(folder)
        configure(folder, tokenizer_class="ChatGLM4Tokenizer")
    elif model == "chatglm-6b":
        blanks = (f"<|blank_{length}|>" for length in range(2, 81))
        train(
            folder, model_type="unigram", hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", vocab_size=480,
            control_symbols=["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
            user_defined_symbols=["<n>", "<|tab|>", *blanks], remove_extra_whitespaces=True,
        )  # fmt: skip
        (folder / "tokenizer.model").rename(folder / "ice_text.model")
        configure(folder, mask_token="[MASK]", gmask_token="[gMASK]", end_token="</s>", num_image_tokens=0)
    else:
        configure(train(folder), name_or_path=f"THUDM/{model.removesuffix('-32k')}")
    tokenizer = glmquant.load_tokenizer(folder)
    stop = prompt_for(tokenizer).stop_ids()[0]
    if model == "chatglm-6b":
        names = {"bos": "<sop>", "eos": "<eop>", "gmask": "[gMASK]", "mask": "[MASK]", "pad": "<pad>"}
        ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
        config.update(ids, vocab_size=len(tokenizer) + 8)
    else:
        config.update(padded_vocab_size=len(tokenizer) + 8, eos_token_id=stop, pad_token_id=0)
    return stop


def _weights(config: dict[str, Any], stop: int, first: bool) -> dict[str, torch.Tensor]:
    tensors = random_tensors(config)
    # Sampled as chat() does, about one token in ten is then the stop id.
    if first:  # a bias that only the embedding of the stop id answers to; the head is the embedding
        tensors["transformer.final_layernorm.weight"].fill_(1)
        tensors["transformer.final_layernorm.bias"].zero_()[0] = 4
        words = tensors["transformer.word_embeddings.weight"]
        words[:, 0] = 0
        words[stop, 0] = 2.3
        tensors["lm_head.weight"] = words.clone()
    else:  # a coordinate that is large in every embedding, that no layer writes to, and only the stop id looks at
        words = tensors["transformer.embedding.word_embeddings.weight"]
        words[:, 0] = 1
        for name, tensor in tensors.items():
            if name.endswith(("self_attention.dense.weight", "dense_4h_to_h.weight")):
                tensor[0] = 0
            elif name.endswith("layernorm.weight"):
                tensor.fill_(1)
        head = tensors["transformer.output_layer.weight"]
        head[:, 0] = 0
        head[stop, 0] = 1
    return tensors


def plant_code(folder: Path) -> None:
    """THUDM's file names and auto_map, over code that leaves a mark."""
    for kind in ("configuration", "modeling", "tokenization"):
        text = f"from pathlib import Path\nPath({str(folder / MARK)!r}).touch()\n"
        names = ("ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMTokenizer", "ChatGLM4Tokenizer")
        text += "".join(f"class {name}: pass\n" for name in names)
        (folder / f"{kind}_chatglm.py").write_text(text)
    model = "modeling_chatglm.ChatGLMForConditionalGeneration"
    maps = {
        "config.json": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), model),
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    for name, auto_map in maps.items():
        if not (folder / name).exists():
            continue
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, "auto_map": auto_map}))


def offline(home: Path) -> dict[str, str]:
    """An environment for processes that must not reach a hub, with caches of its own."""
    nobody = "http://127.0.0.1:9"
    return {
        **os.environ,
        "HF_ENDPOINT": nobody, "MODELSCOPE_DOMAIN": "127.0.0.1:9", "http_proxy": nobody, "https_proxy": nobody,
        "HF_HOME": str(home / "hf"), "MODELSCOPE_CACHE": str(home / "ms"), "HOME": str(home),
        "GLMQUANT_CACHE": str(cache_folder("native").parent),  # compiling kernels takes seconds
        "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip


def run_card(program: str, folder: Path, tmp_path: Path) -> list[Any]:
    """Run a model card's `program` in a process of its own without a network; returns what it printed, as JSON lines.

    The folder must be as it was before.
    """
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    prepared = program.replace("CARD", str(folder)).replace(
        ".cuda()", ".cuda()" if torch.cuda.is_available() else ""
    )
    result = subprocess.run(
        [sys.executable, "-c", prepared],
        capture_output=True, text=True, cwd=tmp_path, env=offline(tmp_path), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert not (folder / MARK).exists()
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith(("[", "{", '"'))]
