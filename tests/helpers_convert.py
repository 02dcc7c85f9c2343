"""Small ChatGLM3 checkpoints made on the spot, and ways to run the command line on them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmquant import Recipe

CLI = [sys.executable, "-m", "glmquant.cli"]


def config(layers: int = 2, hidden: int = 128, ffn: int = 256, vocab: int = 320) -> dict[str, Any]:
    """``config.json`` of a ChatGLM3 with heads of 32."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "eos_token_id": 2,
        "ffn_hidden_size": ffn,
        "hidden_size": hidden,
        "kv_channels": 32,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": hidden // 32,
        "num_layers": layers,
        "original_rope": True,
        "pad_token_id": 0,
        "padded_vocab_size": vocab,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Gaussian weights of the spread that real ones have, in half."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    qkv = hidden + 2 * config["multi_query_group_num"] * config["kv_channels"]
    made = {"transformer.embedding.word_embeddings.weight": normal(vocab, hidden)}
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}."
        made[layer + "input_layernorm.weight"] = 1 + normal(hidden)
        made[layer + "self_attention.query_key_value.weight"] = normal(qkv, hidden)
        made[layer + "self_attention.query_key_value.bias"] = normal(qkv)
        made[layer + "self_attention.dense.weight"] = normal(hidden, hidden)
        made[layer + "post_attention_layernorm.weight"] = 1 + normal(hidden)
        made[layer + "mlp.dense_h_to_4h.weight"] = normal(2 * ffn, hidden)
        made[layer + "mlp.dense_4h_to_h.weight"] = normal(hidden, ffn)
    made["transformer.encoder.final_layernorm.weight"] = 1 + normal(hidden)
    made["transformer.output_layer.weight"] = normal(vocab, hidden)
    return made


def write_source(
    folder: Path,
    made: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shards: int = 1,
    kind: str = "safetensors",
) -> Path:
    """Write a checkpoint folder in `shards` files, as safetensors or as ``bin``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = list(made)
    per_shard = -(-len(names) // shards)
    parts = [names[i : i + per_shard] for i in range(0, len(names), per_shard)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}{suffix}" if shards == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}{suffix}"
        content = {name: made[name] for name in part}
        if kind == "safetensors":
            save_file(content, folder / file, metadata={"format": "pt"})
        else:
            torch.save(content, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def small_source(
    folder: Path, seed: int = 0, shards: int = 1, kind: str = "safetensors", **sizes: int
) -> Path:
    """A model of a megabyte, or of the given sizes."""
    made = config(**sizes)
    return write_source(folder, tensors(made, seed), made, shards, kind)


def run_cli(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and wait."""
    return subprocess.run(
        [*CLI, *map(str, args)], capture_output=True, text=True, timeout=120, env=_environment(), **options
    )


def start_cli(*args: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*CLI, *map(str, args)], env=_environment(), **streams | options)


def _environment() -> dict[str, str]:
    # One thread of torch: the tests count on no more than two cores. The console's width decides nothing here.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of `folder`."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def flip_byte(path: Path, offset: int = -1) -> None:
    """Change one byte of a file in place, and neither its size nor its mtime."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def partial_of(out: Path) -> Path:
    """The folder in which `out` is being written."""
    return out.with_name(out.name + ".partial")


SMALL_SHARDS = Recipe(method="rtn", max_shard_size=100_000)
"""Of `small_source`, this makes a handful of shards."""


def fail_late(done: int, total: int, name: str) -> None:
    """A progress callback that ends the conversion when some shards are whole and some are not."""
    if done > 0.8 * total:
        raise RuntimeError("stop")


def wait_until(condition: Callable[[], bool], patience: float = 60) -> None:
    """Look every half millisecond whether `condition` holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


@contextmanager
def tmpfs(folder: Path, *options: str) -> Iterator[bool]:
    """Make `folder` a file system in memory; yields False where we have no right to."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    allowed = sys.platform == "linux" and os.geteuid() == 0
    mounted = allowed and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def glmquant_on_path(folder: Path) -> str:
    """A PATH on which ``glmquant`` is this one, for scripts."""
    folder.mkdir(parents=True)
    command = folder / "glmquant"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m glmquant.cli "$@"\n')
    command.chmod(0o755)
    return f"{folder}{os.pathsep}{os.defpath}"


def run_script(script: str, folder: Path, places: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a shell script as pipelines do: it ends with the first command that fails."""
    return subprocess.run(
        ["/bin/sh", "-ec", script], env={**os.environ, **places}, cwd=folder, capture_output=True, text=True
    )
