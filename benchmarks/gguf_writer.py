"""A GGUF of a checkpoint in the original layout, for measuring llama.cpp on the same weights.

Shapes and names are those of llama.cpp's ``chatglm`` architecture. A vocabulary goes in for the stand-in only; the
synthetic checkpoints have none, so their prompts have to be ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from glmquant import families
from glmquant.checkpoint.source import open_folder

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.query_key_value.bias": "attn_qkv.bias",
    "self_attention.dense.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}
_NAMES = {
    "transformer.embedding.word_embeddings.weight": "token_embd.weight",
    "transformer.encoder.final_layernorm.weight": "output_norm.weight",
    "transformer.output_layer.weight": "output.weight",
}


def write(source: Path, out: Path, layers: str = "F16") -> Path:
    """Write the checkpoint in `source` (float16, original layout) as one GGUF file; returns `out`.

    Args:
        source: a folder.
        out: the file; left as it is if it is there.
        layers: type of the matrices of the layers: ``F16``, ``Q4_0``, ``Q8_0``. Embedding and output head are F16.
    """
    if out.exists():
        return out
    checkpoint = open_folder(source)
    family = families.detect(checkpoint.config)
    dims = family.dims(checkpoint.config)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "chatglm")
    writer.add_context_length(dims.context)
    writer.add_embedding_length(dims.hidden)
    writer.add_feed_forward_length(dims.ffn)
    writer.add_block_count(dims.layers)
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_layer_norm_rms_eps(checkpoint.config["layernorm_epsilon"])
    writer.add_rope_dimension_count(dims.head_dim // 2)
    writer.add_rope_freq_base(10000.0 * checkpoint.config.get("rope_ratio", 1))
    if (source / "tokenizer.json").exists():
        _add_vocabulary(writer, source)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(dims.vocab)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{layers}"])
    named = [(spec.name, _gguf_name(spec.name)) for spec in family.tensors(dims)]
    kept = [(name, target) for name, target in named if target]
    for name, target in kept:
        shape = checkpoint.infos()[name].shape
        stored = _type(target, len(shape), layers)
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, stored)))
        writer.add_tensor_info(target, shape, np.dtype(np.float32), nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, target in kept:
        tensor = checkpoint.read(name)
        stored = _type(target, tensor.dim(), layers)
        writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), stored))
    writer.close()
    return partial.rename(out)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path) -> None:
    """The stand-in's: SmolLM2's byte-level BPE, and its chat template."""
    tokenizer: dict[str, Any] = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids: dict[str, int] = {**tokenizer["model"]["vocab"], **special}
    names = sorted(ids, key=ids.__getitem__)
    kinds = (gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names)
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types(list(kinds))
    writer.add_token_merges(list(merges))
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_chat_template((source / "chat_template.jinja").read_text(encoding="utf-8"))


def _type(target: str, dimensions: int, layers: str) -> gguf.GGMLQuantizationType:
    if dimensions == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[layers if target.startswith("blk.") else "F16"]


def _gguf_name(name: str) -> str | None:
    if name in _NAMES:
        return _NAMES[name]
    layer, _, rest = name.removeprefix("transformer.encoder.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[rest]}" if rest in _LAYER_NAMES else None
