"""GGUF, llama.cpp's format: one file with the model, its sizes, vocabulary and chat template.

A matrix [out, in] is rows of blocks of 32 weights:

    Q4_0   18 bytes   half d, then 16 bytes: code + 8; elements 0-15 in the low halves, 16-31 in the high ones
    Q4_1   20 bytes   half d, half m, then as Q4_0 with codes 0..15; a weight is d*code + m
    Q8_0   34 bytes   half d, then 32 int8 codes

Scales and codes are our quantizers' own; d may be negative. Norms and biases are float32, as llama.cpp adds them.
K-quants are llama.cpp's: it makes them of a file in F16 (`glmquant.formats.k_quants`), and they are read as the
weights that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import GGUF_FILE
from ..checkpoint.gguf import K_QUANT, GgufLayout, library, preamble
from ..checkpoint.sink import ShardLayout, StoredTensor
from ..errors import SourceError, UsageError
from ..families import Role
from ..recipe import Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import Abilities, FormatBase, LastStep, ModelFacts, StoredWeight, refuse_quantizing
from .k_quants import llama_quantize, requantize

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family, LayoutTensor

BLOCK = 32
_TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
_SCHEMES = (Scheme(4, BLOCK), Scheme(4, BLOCK, symmetric=False, minimum=True), Scheme(8, BLOCK))
_HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}  # bytes before the codes
_FILE_TYPES = {"F16": "MOSTLY_F16", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0"}
_ARCHITECTURES = {"chatglm2": "chatglm", "glm": "chatglm", "glm4": "glm4"}


class Gguf(FormatBase):
    """See the module."""

    name = "gguf"
    abilities = Abilities(
        bits=(4, 8, 16),
        groups=(32,),
        methods=("mse", "rtn"),
        layouts=("original", "native"),
        asymmetric_bits=(4,),
        runtimes=("glmquant", "llama.cpp"),
    )

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return _section(config).get("quant_method") == "gguf"

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        if family.name not in _ARCHITECTURES:
            raise UsageError("llama.cpp knows no ChatGLM-6B; use --format cpm.")
        if recipe.layout not in (None, "original" if "original" in family.layouts else "native"):
            raise UsageError("--format gguf has names of its own; leave out --layout.")
        chosen = (
            recipe.method,
            recipe.group_size,
            recipe.quantize_head or None,
            recipe.quantize_embeddings or None,
        )
        if recipe.k_quant is not None and any(chosen):
            raise UsageError(
                f"llama-quantize decides about every weight of {recipe.k_quant}; leave out --method, --group-size, "
                "--quantize-head and --quantize-embeddings."
            )
        if recipe.bits == 16:
            refuse_quantizing(recipe)
        library()
        if recipe.k_quant is not None:
            llama_quantize(recipe.k_quant)

    def linear_scheme(self, recipe: Recipe, weight_dtype: str) -> Scheme:
        """See `Format`. Asymmetric weights are those of Q4_1."""
        scheme = super().linear_scheme(recipe, weight_dtype)
        return scheme if scheme.symmetric else replace(scheme, minimum=True)

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """See `Format`."""
        wanted = {Role.HEAD: recipe.quantize_head, Role.EMBEDDING: recipe.quantize_embeddings}
        return {role: Scheme(8, BLOCK) for role, want in wanted.items() if want}

    def copied(self, tensor: LayoutTensor, dtype: str) -> StoredTensor | None:
        """See `Format`."""
        if tensor.role is Role.BUFFER:
            return None
        return StoredTensor(tensor.name, "F16" if len(tensor.shape) > 1 else "F32", tensor.shape)

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        kind = _TYPES[scheme.bits, scheme.symmetric]
        width = shape[1] // BLOCK * (_HEADS[kind] + BLOCK * scheme.bits // 8)
        return (StoredTensor(name, "U8", (shape[0], width), blocks=kind),)

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`."""
        import torch

        rows, columns = tensor.codes.shape
        codes = tensor.codes.view(rows, columns // BLOCK, BLOCK)
        parts = [tensor.scale]
        if tensor.minimum is not None:
            parts.append(tensor.minimum)
        head = torch.stack(parts, -1).view(torch.uint8)
        if tensor.scheme.bits == 4:
            unsigned = codes.view(torch.uint8) + 8
            codes = unsigned[..., :16] | (unsigned[..., 16:] << 4)
        return {name: torch.cat([head, codes.view(torch.uint8)], -1).view(rows, -1)}

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`."""
        import torch

        scheme, (rows, columns) = weight.scheme, weight.shape
        head = _HEADS[_TYPES[scheme.bits, scheme.symmetric]]
        blocks = stored[weight.name].view(rows, columns // BLOCK, -1)
        scales = blocks[..., :head].contiguous().view(torch.float16)
        codes = blocks[..., head:].contiguous()
        if scheme.bits == 4:
            codes = torch.cat([codes & 0xF, codes >> 4], -1) - 8
        minimum = None if scheme.symmetric else scales[..., 1].contiguous()
        return QuantizedTensor(
            codes.view(torch.int8).reshape(rows, columns), scales[..., 0].contiguous(), None, scheme, minimum
        )

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`. llama.cpp does not read it; glmquant does."""
        types = {weight.role.value: _type(weight.scheme) for weight in weights}
        k_quant = {} if recipe.k_quant is None else {K_QUANT: recipe.k_quant}
        return {"quantization_config": {"quant_method": "gguf", "file": GGUF_FILE, "types": types, **k_quant}}

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        if recipe.k_quant is None:
            return ()
        return (
            f"once the file is whole in F16, llama-quantize makes {recipe.k_quant} of it; a plan shows F16.",
        )

    def last_step(self, recipe: Recipe) -> LastStep | None:
        """See `Format`."""
        kind = recipe.k_quant
        if kind is None:
            return None
        return LastStep(f"llama-quantize {kind}", lambda folder, threads: requantize(folder, kind, threads))

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`."""
        known = {_type(scheme): scheme for scheme in _SCHEMES}
        try:
            schemes = {Role(role): known[kind] for role, kind in _section(config)["types"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"quantization_config in config.json is damaged, or of a kind not known here ({error!r})."
            ) from None
        return [
            StoredWeight(tensor.name, schemes[tensor.role], (tensor.shape[0], tensor.shape[1]), tensor.role)
            for tensor in family.in_layout(dims, family.layout_of(config))
            if tensor.role in schemes
        ]

    def files(self, tensors: Sequence[Sequence[StoredTensor]], model: ModelFacts) -> tuple[ShardLayout, ...]:
        """See `Format`."""
        d = model.dims
        if model.family.name == "chatglm2" and d.heads * d.head_dim != d.hidden:
            raise UsageError(
                f"llama.cpp reads models of this kind only with {d.hidden} = heads x head size (here "
                f"{d.heads} x {d.head_dim}); use --format compressed-tensors."
            )
        flat = {tensor.name: tensor for together in tensors for tensor in together}
        keys = {**_sizes(model, flat), **_vocabulary(model)}
        start = preamble(_ARCHITECTURES[model.family.name], keys, flat)
        return (GgufLayout(GGUF_FILE, tuple(flat.values()), start),)


def _type(scheme: Scheme) -> str:
    return _TYPES[scheme.bits, scheme.symmetric]


def _sizes(model: ModelFacts, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What llama.cpp wants to know about a model, in the order in which its own converter writes it."""
    gguf = library()
    assert model.family.native_config is not None
    native = model.family.native_config(model.config)
    rope = {**native, **(native.get("rope_parameters") or {})}
    d = model.dims
    recipe = model.recipe
    kind = "F16" if recipe.bits == 16 else _TYPES[recipe.bits, recipe.symmetric]
    return {
        "name": str(model.config.get("_name_or_path") or model.family.describe(model.config)),
        "context_length": d.context,
        "embedding_length": d.hidden,
        "feed_forward_length": d.ffn,
        "block_count": d.layers,
        "head_count": d.heads,
        "head_count_kv": d.kv_heads,
        "layer_norm_rms_eps": native.get("rms_norm_eps", 1.5625e-07),
        "rope_dimension_count": int(d.head_dim * rope.get("partial_rotary_factor", 0.5)),
        "rope_freq_base": float(rope.get("rope_theta", 10000.0)),
        "file_type": int(gguf.LlamaFileType[_FILE_TYPES[kind]]),
        "quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _vocabulary(model: ModelFacts) -> dict[str, Any]:
    from ..tokenizers.llama_cpp import vocabulary

    found = vocabulary(model.folder, model.dims.vocab, model.config)
    if found is None:
        return {"vocab_size": model.dims.vocab, "tokenizer_model": "no_vocab"}
    names = {"eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id", "unknown": "unk_token_id",
             "padding": "pad_token_id"}  # fmt: skip
    return {
        "vocab_size": model.dims.vocab,
        "tokenizer_model": found.model,
        "tokenizer_pre": found.pre,
        "token_list": found.tokens,
        "token_types": found.types,
        "token_scores": found.scores,
        "token_merges": found.merges,
        **{names[name]: row for name, row in found.special.items()},
        "add_bos_token": False,
        "chat_template": found.template,
    }


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("quantization_config")
    return section if isinstance(section, Mapping) else {}
