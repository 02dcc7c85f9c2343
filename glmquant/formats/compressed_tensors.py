"""compressed-tensors ``pack-quantized``, which transformers, vLLM and SGLang read without glmquant.

For a weight [out, in] of b bits:

    weight_packed      int32 [out, ceil(in*b/32)]   code + 2**(b-1), element 0 in the lowest bits
    weight_scale       [out, in/group]              [out, 1] for one scale per row
    weight_shape       int64 [2]                    out, in
    weight_zero_point  int32 [ceil(out*b/32), in/group]   asymmetric only; packed like the codes, along *rows*

And ``int-quantized`` W8A8, whose readers round activations to 8 bits too, token by token:

    weight             int8 [out, in]
    weight_scale       [out, 1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..errors import SourceError, UsageError
from ..families import Role, stated_dtype
from ..recipe import CALIBRATED, Group, Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import ROW, Abilities, FormatBase, StoredWeight, refuse_quantized_ends

if TYPE_CHECKING:
    import torch

    from ..families import Dims, Family

_SCALE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_STORED_DTYPES = {value: key for key, value in _SCALE_DTYPES.items()}


class CompressedTensors(FormatBase):
    """See the module."""

    name = "compressed-tensors"
    abilities = Abilities(
        bits=(4, 8),
        groups=(128, 64, 32, "row"),
        methods=("mse", "rtn", "hqq", *CALIBRATED),
        layouts=("native", "original"),
        asymmetric_bits=(4,),
        runtimes=("glmquant", "transformers", "vllm"),
        mixed=True,
        activations=(8,),
    )
    # 4-bit zero points of eight rows share a word
    row_multiple = 8

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return _section(config).get("quant_method") == "compressed-tensors"

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        if "native" not in family.layouts:
            raise UsageError("no engine reads compressed-tensors weights of ChatGLM-6B; use --format cpm.")
        if recipe.activations is not None:
            if recipe.bits != 8 or recipe.group_size not in (None, "row") or not recipe.symmetric:
                raise UsageError(
                    "--bits w8a8 has one scale for a row and is symmetric; leave out --group-size and --asymmetric."
                )
            refuse_quantized_ends(recipe, "--bits w8a8 keeps embedding and head in 16 bit")

    def default_group(self, recipe: Recipe) -> Group:
        """See `Format`."""
        return ROW if recipe.activations else self.abilities.groups[0]

    def linear_scheme(self, recipe: Recipe, weight_dtype: str) -> Scheme:
        """See `Format`."""
        return replace(super().linear_scheme(recipe, weight_dtype), activations=recipe.activations)

    def end_schemes(self, recipe: Recipe, linear: Scheme) -> dict[Role, Scheme]:
        """See `Format`."""
        ends = Scheme(8, linear.group_size, scale_dtype=linear.scale_dtype)
        wanted = {Role.HEAD: recipe.quantize_head, Role.EMBEDDING: recipe.quantize_embeddings}
        return {role: ends for role, want in wanted.items() if want}

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        notes = []
        if recipe.layout == "native":
            notes.append(
                "transformers unpacks compressed-tensors weights to 16 bit at first use; vLLM keeps them packed."
            )
        if recipe.quantize_embeddings:
            notes.append(
                "transformers loads 8-bit embeddings only with --bits 8 --quantize-head (one scheme for everything); "
                "vLLM does not read them."
            )
        return tuple(notes)

    def scale_dtype(self, weight_dtype: str) -> str:
        """See `Format`."""
        return _SCALE_DTYPES[weight_dtype]

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        rows, columns = shape
        if scheme.activations:
            scale = StoredTensor(name + "_scale", _STORED_DTYPES[scheme.scale_dtype], (rows, 1))
            return (StoredTensor(name, "I8", shape), scale)
        groups = scheme.groups(columns)
        words = -(-columns * scheme.bits // 32)
        stored = [
            StoredTensor(name + "_packed", "I32", (rows, words)),
            StoredTensor(name + "_scale", _STORED_DTYPES[scheme.scale_dtype], (rows, groups)),
        ]
        if not scheme.symmetric:
            words = -(-rows * scheme.bits // 32)
            stored.append(StoredTensor(name + "_zero_point", "I32", (words, groups), per=32 // scheme.bits))
        stored.append(StoredTensor(name + "_shape", "I64", (2,), constant=shape))
        return tuple(stored)

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`."""
        from ..packing import pack_int32

        if tensor.scheme.activations:
            return {name: tensor.codes, name + "_scale": tensor.scale}
        bits = tensor.scheme.bits
        stored = {
            name + "_packed": pack_int32(tensor.codes, bits),
            name + "_scale": tensor.scale,
        }
        if tensor.zero_point is not None:
            stored[name + "_zero_point"] = pack_int32(tensor.zero_point.t(), bits).t()
        return stored

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`."""
        from ..packing import unpack_int32

        name, scheme = weight.name, weight.scheme
        if scheme.activations:
            return QuantizedTensor(stored[name].contiguous(), stored[name + "_scale"], None, scheme)
        codes = unpack_int32(stored[name + "_packed"], scheme.bits, weight.shape[1])
        zero_point = None
        if not scheme.symmetric:
            packed = stored[name + "_zero_point"].t()
            zero_point = unpack_int32(packed, scheme.bits, codes.shape[0]).t()
        return QuantizedTensor(codes, stored[name + "_scale"], zero_point, scheme)

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`."""
        schemes: dict[Scheme, list[StoredWeight]] = {}
        for weight in weights:
            schemes.setdefault(weight.scheme, []).append(weight)
        groups: dict[str, dict[str, Any]] = {}
        # The scheme of most weights gets the class as its target. Everything else is named: other schemes, the
        # embedding (no Linear), and the head (no Linear in vLLM). Named groups go first, because compressed-tensors
        # tries targets in order and warns of those it never came to.
        ordered = sorted(schemes, key=lambda s: len(schemes[s]))
        for number, scheme in enumerate(ordered):
            most = number == len(ordered) - 1
            names = sorted(
                weight.name.removesuffix(".weight")
                for weight in schemes[scheme]
                if not most or weight.role is not Role.LINEAR
            )
            groups[f"group_{number}"] = {
                "targets": [*names, "Linear"] if most else names,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": scheme.symmetric,
                    "strategy": "channel" if scheme.group_size is None else "group",
                    "group_size": scheme.group_size,
                },
            }
            if scheme.activations:
                groups[f"group_{number}"]["input_activations"] = {
                    "num_bits": scheme.activations,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                }
        section: dict[str, Any] = {}
        embedding = any(weight.role is Role.EMBEDDING for weight in weights)
        if any(not scheme.symmetric for scheme in schemes) or (embedding and len(schemes) == 1 and not left):
            # transformers 5.23 with compressed-tensors 0.20 can read packed zero points and quantized embeddings
            # only in this mode, which unpacks while loading instead of at first use, and knows only one scheme.
            section["dequantize"] = True
        return {
            "quantization_config": {
                **section,
                "quant_method": "compressed-tensors",
                "format": "int-quantized" if recipe.activations else "pack-quantized",
                "quantization_status": "compressed",
                "ignore": list(left),
                "config_groups": groups,
            }
        }

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`. Understands the configurations that `config` writes."""
        section = _section(config)
        if section.get("format") not in ("pack-quantized", "int-quantized"):
            raise SourceError(
                f"compressed-tensors format {section.get('format')!r} is not known here; only pack-quantized and "
                "int-quantized are."
            )
        try:
            by_target = _schemes(section, self.scale_dtype(stated_dtype(config)))
            ignored = set(section.get("ignore") or ())
        except (AttributeError, KeyError, TypeError, UsageError) as error:
            raise SourceError(
                f"quantization_config in config.json is damaged, or of a kind not known here ({error!r})."
            ) from None
        found = []
        for tensor in family.in_layout(dims, family.layout_of(config)):
            module = tensor.name.removesuffix(".weight")
            named = by_target.get(module)
            if tensor.role in (Role.LINEAR, Role.HEAD) and module not in ignored:
                named = named or by_target.get("Linear")
            if named is not None:
                found.append(
                    StoredWeight(tensor.name, named, (tensor.shape[0], tensor.shape[1]), tensor.role)
                )
        return found


def _schemes(section: Mapping[str, Any], scale_dtype: str) -> dict[str, Scheme]:
    """The schemes of a quantization_config by target."""
    by_target: dict[str, Scheme] = {}
    for group in section["config_groups"].values():
        weights = group["weights"]
        scheme = Scheme(
            bits=weights["num_bits"],
            group_size=weights.get("group_size") if weights.get("strategy") == "group" else None,
            symmetric=weights.get("symmetric", True),
            scale_dtype=scale_dtype,  # type: ignore[arg-type]
            activations=_activations(section, group),
        )
        by_target.update(dict.fromkeys(group["targets"], scheme))
    return by_target


def _activations(section: Mapping[str, Any], group: Mapping[str, Any]) -> int | None:
    """Bits of activations in ``int-quantized``, of which W8A8 alone is known here."""
    if section["format"] == "pack-quantized":
        return None
    bits: int = (group.get("input_activations") or {})["num_bits"]
    if bits != 8 or group["weights"]["num_bits"] != 8 or group["weights"].get("strategy") != "channel":
        raise UsageError("of int-quantized, only W8A8 with a scale for each row is known here")
    return bits


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("quantization_config")
    return section if isinstance(section, Mapping) else {}
