"""GGUF files: what llama.cpp calls the tensors, the bytes before them, and reading them again.

Everywhere else tensors keep the names of the checkpoint's layout, and a quantized matrix is its rows of blocks as
bytes (``U8``).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError, UsageError
from .sink import ShardLayout, StoredTensor
from .source import TensorInfo, _FolderSource

if TYPE_CHECKING:
    import torch

ALIGNMENT = 32
K_QUANT = "k_quant"
"""In a ``quantization_config``: the type of file that llama.cpp itself has made."""

# What llama.cpp calls the modules of the two layouts; {} is the number of a layer.
_ORIGINAL = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "transformer.encoder.layers.{}.self_attention.query_key_value": "blk.{}.attn_qkv",
    "transformer.encoder.layers.{}.self_attention.dense": "blk.{}.attn_output",
    "transformer.encoder.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "transformer.encoder.layers.{}.mlp.dense_h_to_4h": "blk.{}.ffn_up",
    "transformer.encoder.layers.{}.mlp.dense_4h_to_h": "blk.{}.ffn_down",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
}
_NATIVE = {
    "model.embed_tokens": "token_embd",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_self_attn_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_mlp_layernorm": "blk.{}.post_ffw_norm",
    "model.layers.{}.mlp.gate_up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_THEIRS = _ORIGINAL | _NATIVE
_OURS = {
    layout: {b: a for a, b in table.items()}
    for layout, table in (("original", _ORIGINAL), ("native", _NATIVE))
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of the original or the native layout."""
    return _renamed(name, _THEIRS)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` by a table of modules; unknown names stay as they are."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    layer = number[1] if number else ""
    found = table.get(module.replace(f".{layer}.", ".{}.", 1) if number else module)
    return name if found is None else f"{found.format(layer)}.{kind}"


def library() -> Any:
    """The package ``gguf``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the package gguf: pip install 'glmquant[gguf]'.") from None
    return gguf


@dataclass(frozen=True)
class GgufLayout(ShardLayout):
    """A GGUF file; see `ShardLayout`.

    Attributes:
        preamble: everything before the data of the first tensor.
    """

    preamble: bytes = b""

    def in_file_order(self) -> tuple[StoredTensor, ...]:
        """The tensors, each followed by the zeros that the next one's alignment takes."""
        return self._padded

    @cached_property
    def _padded(self) -> tuple[StoredTensor, ...]:
        ordered = []
        for number, tensor in enumerate(self.tensors):
            ordered.append(tensor)
            missing = -tensor.nbytes % ALIGNMENT
            if missing:
                ordered.append(StoredTensor(f"padding {number}", "U8", (missing,), constant=(0,) * missing))
        return tuple(ordered)

    def header(self) -> bytes:
        """See `preamble`."""
        return self.preamble

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.preamble) + sum(tensor.nbytes for tensor in self.in_file_order())


def preamble(architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bytes:
    """The beginning of a GGUF file, as the package ``gguf`` writes it, padded to where data begins.

    Args:
        architecture: llama.cpp's name of it.
        keys: methods of ``GGUFWriter`` less their ``add_``, and what to call them with; None is left out.
        tensors: in file order, by their name in the layout; quantized ones are ``U8``.
    """
    gguf = library()
    import numpy

    writer = gguf.GGUFWriter(None, architecture)
    for key, value in keys.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    types = gguf.GGMLQuantizationType
    for name, tensor in tensors.items():
        plain = {"F16": types.F16, "F32": types.F32, "BF16": types.BF16}.get(tensor.dtype)
        kind = types[str(tensor.blocks)] if plain is None else plain
        dtype = numpy.dtype(numpy.uint8 if plain is None else numpy.float16)
        writer.add_tensor_info(gguf_name(name), tensor.shape, dtype, tensor.nbytes, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preamble"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    return data + bytes(-len(data) % ALIGNMENT)


class GgufSource(_FolderSource):
    """A folder with one GGUF file and the ``config.json`` of its model.

    In a file that llama.cpp has quantized, matrices of many types stand side by side; they are read as float32.
    """

    @cached_property
    def _decodes(self) -> bool:
        section = self.config.get("quantization_config")
        return isinstance(section, dict) and K_QUANT in section

    def _open_shard(self, path: Path) -> dict[str, Any]:
        try:
            # Copy-on-write, so that torch does not warn of memory that must not be written to.
            tensors = library().GGUFReader(path, "c").tensors
        except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise SourceError(
                f"{path} is not a sound GGUF file ({error}); convert or download it again."
            ) from None
        ours = _OURS["original" if self.config.get("model_type") == "chatglm" else "native"]
        return {_renamed(tensor.name, ours): tensor for tensor in tensors}

    def _shard_infos(self, shard: str) -> list[TensorInfo]:
        return list(self._headers(shard))

    def _headers(self, shard: str) -> Iterator[TensorInfo]:
        dtypes = {"float16": "F16", "float32": "F32", "uint8": "U8"}
        for name, tensor in self._handle(shard).items():
            data, kind = tensor.data, tensor.tensor_type
            if self._decodes and str(data.dtype) == "uint8":
                shape = tuple(int(n) for n in tensor.shape[::-1])
                yield TensorInfo(name, "F32", shape, shard, kind.name, data.nbytes)
                continue
            if str(data.dtype) not in dtypes:
                raise SourceError(
                    f"{name} in {shard} has numbers of type {data.dtype}, which is not known here."
                )
            yield TensorInfo(name, dtypes[str(data.dtype)], tuple(data.shape), shard)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        import numpy
        import torch

        info = self._infos[name]
        tensor = self._handle(info.shard)[name]
        rows = tensor.data[start:stop]
        if info.decoded is not None:
            try:
                with numpy.errstate(invalid="ignore"):  # whoever asked looks for NaN
                    rows = library().quants.dequantize(rows, tensor.tensor_type)
            except NotImplementedError as error:
                raise SourceError(
                    f"{name} in {info.shard} cannot be read here ({error}); use the 16-bit original."
                ) from None
        return torch.from_numpy(rows)
