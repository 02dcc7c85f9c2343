"""llama.cpp's own importance matrix and quantizer, on the weights that everybody else gets.

``llama-imatrix`` has to run the model, and llama.cpp's ChatGLM wants heads times head size to be the hidden size, which
the lean stand-in has not. Its Llama does not, and computes the same: a layer of transformers' Glm is a layer of Llama
but for the positions, which turn part of each head; to Llama, frequencies are handed over one by one, those of the rest
as good as zero. The vocabulary of the file is numbers, so that the tool reads exactly the windows of all the others.

Both programs are looked for on PATH. They are built from llama.cpp's source (``llama_cpp_python``'s source package has
it in ``vendor/llama.cpp``) by ``cmake -B build -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF`` and ``cmake --build build
--target llama-imatrix llama-quantize``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import measure

_STILL = 1e30  # divides a frequency
_NAMES = {
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("ffn_norm",),
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


PLAIN, MATRIX = "f16.gguf", "imatrix.gguf"


class MissingProgram(Exception):
    """A program of llama.cpp is not on PATH."""


def importance(source: Path, windows: Path, folder: Path) -> measure.Measured:
    """Have ``llama-imatrix`` read the windows; what that cost.

    Args:
        source: a native 16-bit folder with one safetensors file, ``model_type: glm``.
        windows: a safetensors file with ``ids`` [windows, tokens].
        folder: for `PLAIN` and `MATRIX`. What is there already is used again.

    Raises:
        MissingProgram: see there.
    """
    noted = folder / "imatrix.json"
    if noted.exists():
        return measure.Measured(**json.loads(noted.read_text()))
    program = _program("llama-imatrix")
    folder.mkdir(parents=True, exist_ok=True)
    write(source, folder / PLAIN)
    ids = load_file(windows)["ids"]
    text, size = folder / "ids.txt", str(ids.shape[1])
    text.write_text("".join(f"{token} " for token in ids.flatten().tolist()))
    cost = measure.run(
        [program, "-m", str(folder / PLAIN), "-f", str(text), "-o", str(folder / MATRIX), "-c", size, "-b", size,
         "-ub", size, "-t", "1"]
    )  # fmt: skip
    noted.write_text(json.dumps(asdict(replace(cost, output=""))))
    return cost


def quantized(
    source: Path, folder: Path, kind: str, out: Path
) -> tuple[dict[str, Tensor], float, measure.Measured]:
    """What ``llama-quantize`` makes of the weights with their importance; embedding and output head stay in 16 bit.

    Args:
        source: as in `importance`.
        folder: which this has filled.
        kind: as the program names it.
        out: the file to write.

    Returns:
        The linear weights by their names in `source`; bits for each weight of theirs; what it cost.

    Raises:
        MissingProgram: see there.
    """
    import gguf

    cost = measure.run(
        [_program("llama-quantize"), "--imatrix", str(folder / MATRIX), "--output-tensor-type", "f16",
         "--token-embedding-type", "f16", str(folder / PLAIN), str(out), kind, "1"]
    )  # fmt: skip
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    weights: dict[str, Tensor] = {}
    size, count = 0, 0
    for number in range(_config(source)["num_hidden_layers"]):
        for ours, theirs in _NAMES.items():
            if ours.endswith("norm"):
                continue
            parts = [stored[f"blk.{number}.{name}.weight"] for name in theirs]
            size += sum(int(part.n_bytes) for part in parts)
            count += sum(int(part.n_elements) for part in parts)
            rows = [torch.from_numpy(gguf.dequantize(part.data, part.tensor_type)) for part in parts]
            weights[f"model.layers.{number}.{ours}.weight"] = torch.cat(rows)
    return weights, 8 * size / count, cost


def write(source: Path, file: Path) -> None:
    """Write a native 16-bit folder as a Llama in GGUF; see the module."""
    import gguf

    config = _config(source)
    head = config["head_dim"]
    turned = int(head * config["partial_rotary_factor"])
    base = config["rope_theta"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(base)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"{token} " for token in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    # frequency i is base^(-2i / head) / factor here, and base^(-2i / turned) there
    pairs = np.arange(head // 2, dtype=np.float64)
    factors = np.where(2 * pairs < turned, base ** (2 * pairs * (1 / turned - 1 / head)), _STILL)
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name, tensor in load_file(source / "model.safetensors").items():
        path, _, part = name.rpartition(".")
        if path in _OUTSIDE:
            names: tuple[str, ...] = (_OUTSIDE[path],)
        else:
            _, _, number, inside = path.split(".", 3)
            names = tuple(f"blk.{number}.{theirs}" for theirs in _NAMES[inside])
        plain = tensor.half() if tensor.ndim == 2 else tensor.float()
        for theirs, rows in zip(names, plain.chunk(len(names)), strict=True):
            writer.add_tensor(f"{theirs}.{part}", rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config(source: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((source / "config.json").read_text())
    return found


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingProgram(f"{name} is not on PATH")
    return found
