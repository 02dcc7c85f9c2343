"""The model of a checkpoint before it has weights: the right class, with packed layers where weights are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from .. import families, formats, hub
from .._open import PathLike
from ..checkpoint.adapter import ADAPTER_CONFIG, AdapterSource, with_adapter
from ..checkpoint.decoded import DecodedSource
from ..checkpoint.files import read_json
from ..checkpoint.source import TensorSource, open_folder
from ..errors import SourceError, UsageError
from ..families import Config, Dims, Family, Part, Role, TensorSpec
from ..formats import Format, StoredWeight
from ..plan import check_source
from ..tokenizers import kind_of
from .quantized import QuantizedEmbedding, QuantizedLinear, packed_names


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers have been found to be a whole model."""

    source: TensorSource
    family: Family
    dims: Dims
    stored_as: Format
    quantized: Mapping[str, StoredWeight]
    """quantized weights by the name of their tensor"""

    def present(self) -> Iterator[TensorSpec]:
        """The tensors of the model that the folder holds and a model reads, in the order of data flow."""
        stored = self.source.infos()
        for spec in self.family.tensors(self.dims):
            if spec.role is not Role.BUFFER and (spec.name in stored or spec.name in self.quantized):
                yield spec

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The parameters that rows of a tensor become."""
        return spec.native or (Part(spec.name, 0, spec.shape[0]),)


def open_checkpoint(path: PathLike, adapter: PathLike | None = None) -> Checkpoint:
    """Open a folder by its headers.

    Raises:
        SourceError: it is no whole model of a known family; names what is missing, foreign or misshapen.
        QuantizedSourceError: it is quantized in a way that is not known here.
        UsageError: an adapter is to be merged into quantized weights.
    """
    folder, adapter = with_adapter(hub.local_folder(path), adapter)
    source = open_folder(folder)
    family = families.detect(source.config)
    dims = family.dims(source.config)
    stored_as = formats.detect(source.config)
    quantized = {weight.name: weight for weight in stored_as.quantized(source.config, family, dims)}
    check_source(DecodedSource(source, stored_as, family, dims) if quantized else source, family, dims)
    if adapter is not None:
        if quantized:
            raise UsageError(
                f"{source.folder} is quantized ({stored_as.name}), and an adapter cannot be merged into packed "
                "weights; load the 16-bit base with it, or convert that base with --adapter"
                + (f" (to load without it, move {ADAPTER_CONFIG} away)." if adapter == folder else ".")
            )
        source = AdapterSource(source, Path(adapter).expanduser(), family, dims)
    return Checkpoint(source, family, dims, stored_as, quantized)


def build(checkpoint: Checkpoint, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """The model of `checkpoint` with its parameters on the meta device."""
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model_class, config = class_and_config(checkpoint.family, checkpoint.source.config)
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=dtype, **options)
    except StrictDataclassError as error:
        raise bad_field(error, checkpoint.source.config, checkpoint.source.folder) from error
    except (AssertionError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SourceError(
            f"config.json of {checkpoint.source.folder}, or attn_implementation, cannot be used to build the model "
            f"({reason})."
        ) from error
    for spec in checkpoint.present():
        weight = checkpoint.quantized.get(spec.name)
        if weight is not None:
            for part in checkpoint.parts(spec):
                path = part.name.removesuffix(".weight")
                model.set_submodule(path, _packed(model.get_submodule(path), weight, dtype))
    _tie_packed_head(model)
    _set_generation_defaults(model, checkpoint)
    return model


def bad_field(error: StrictDataclassError, config: Config, folder: Path) -> SourceError:
    """What to say where transformers' configuration refuses the type of a value in the ``config.json`` of `folder`."""
    field = str(error).partition("'")[2].partition("'")[0]
    return SourceError(
        f"config.json of {folder} gives {field} as {config.get(field)!r:.80}, which is of the wrong type."
    )


def class_and_config(family: Family, config: Config) -> tuple[Any, Any]:
    """The model class for a ``config.json`` of `family`, and the configuration that it takes."""
    if family.name == "chatglm":
        _check_special_ids(config)
        from .chatglm import ChatGLMForConditionalGeneration

        unwanted = ("auto_map", "quantization_bit", "quantization_embeddings")
        values = {key: value for key, value in config.items() if key not in unwanted}
        return ChatGLMForConditionalGeneration, ChatGLMForConditionalGeneration.config_class.from_dict(values)
    from . import glm

    assert family.native_config is not None
    values = family.native_config(config)
    values.pop("quantization_config", None)  # would tell transformers that it has quantized the model itself
    model_class = glm.Glm4ForCausalLM if family.name == "glm4" else glm.GlmForCausalLM
    return model_class, model_class.config_class.from_dict(values)


def _check_special_ids(config: Config) -> None:
    """ChatGLM-6B finds the end of the prompt by these ids, and computes something else where they are wrong."""
    bos, rows = config.get("bos_token_id"), config["vocab_size"]
    if type(bos) is not int or not 0 <= bos < rows:
        raise SourceError(
            f"config.json gives bos_token_id as {bos!r}; it must be the id of <sop>, below {rows}."
        )
    seen = {bos: "bos_token_id"}
    for key in ("mask_token_id", "gmask_token_id", "eos_token_id"):
        stated = config.get(key)
        if not isinstance(stated, int):
            continue
        if not 0 <= stated < rows or stated in seen:
            other = f", which is {seen[stated]}" if stated in seen else ""
            raise SourceError(
                f"config.json gives {key} as {stated}{other}; it must be an id of its own, below {rows}."
            )
        seen[stated] = key


def _packed(layer: nn.Module, weight: StoredWeight, dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, weight.scheme, "meta", dtype)
    assert isinstance(layer, nn.Linear)
    packed = QuantizedLinear(layer.in_features, layer.out_features, False, weight.scheme, "meta")
    packed.bias = layer.bias
    return packed


def _tie_packed_head(model: Any) -> None:
    """ChatGLM-6B stores its quantized embedding twice; in memory there is one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (model.config.tie_word_embeddings and isinstance(embedding, QuantizedEmbedding)):
        return
    paths = {module: path for path, module in model.named_modules()}
    packed = QuantizedLinear(head.in_features, head.out_features, False, embedding.scheme, "meta")
    model.set_submodule(paths[head], packed)
    model._tied_weights_keys = {
        name.replace(paths[embedding], paths[head], 1): name
        for name in packed_names(paths[embedding] + ".weight", embedding)
    }
    model.tie_weights()


def _set_generation_defaults(model: Any, checkpoint: Checkpoint) -> None:
    from transformers import GenerationConfig

    folder, config = checkpoint.source.folder, checkpoint.source.config
    path = folder / "generation_config.json"
    if not path.exists():  # transformers has taken what config.json says
        roles = kind_of(folder) != "chatglm2"
        model.generation_config.eos_token_id = checkpoint.family.stop_ids(config, roles)
        return
    try:
        model.generation_config = GenerationConfig.from_dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise SourceError(f"{path} is damaged ({error}); download it again.") from None
