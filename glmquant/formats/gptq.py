"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: symmetric, without reordered columns.

For a weight [out, in] of b bits, in groups of g columns, every tensor is *transposed*:

    qweight  int32 [in*b/32, out]       code + 2**(b-1), the first column in the lowest bits
    qzeros   int32 [in/g, out*b/32]     zero points, the first row in the lowest bits: 2**(b-1) everywhere in
                                        ``checkpoint_format`` gptq_v2, and one less in gptq (v1)
    scales   half  [in/g, out]
    g_idx    int32 [in]                 the group of each column
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..errors import QuantizedSourceError, SourceError, UsageError
from ..families import Role
from ..recipe import CALIBRATED, Recipe
from ..scheme import QuantizedTensor, Scheme
from .base import Abilities, FormatBase, StoredWeight, refuse_quantized_ends

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ..families import Dims, Family

_FORMATS = {1: "gptq", 2: "gptq_v2"}


@dataclass(frozen=True)
class Gptq(FormatBase):
    """See the module.

    Attributes:
        version: of ``checkpoint_format``.
    """

    version: int = 1

    name = "gptq"
    abilities = Abilities(
        bits=(4, 8),
        groups=(128, 64, 32, "row"),
        methods=("mse", "rtn", *CALIBRATED),
        layouts=("native", "original"),
        runtimes=("glmquant", "vllm"),
    )
    # 4-bit zero points of eight rows share a word
    row_multiple = 8

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return _section(config).get("quant_method") == "gptq"

    def variant(self, config: Mapping[str, Any]) -> Self:
        """See `Format`."""
        stated = _section(config).get("checkpoint_format", _FORMATS[1])
        found = [version for version, name in _FORMATS.items() if name == stated]
        if not found:
            raise QuantizedSourceError(
                f"config.json gives checkpoint_format {stated!r}; of GPTQ, only gptq and gptq_v2 are known here."
            )
        return type(self)(found[0])

    def chosen(self, recipe: Recipe) -> Self:
        """See `Format`."""
        return type(self)(recipe.gptq_version or 1)

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        if "native" not in family.layouts:
            raise UsageError("no engine reads GPTQ weights of ChatGLM-6B; use --format cpm.")
        refuse_quantized_ends(recipe, "--format gptq keeps embedding and head in 16 bit")

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        return (
            "transformers reads GPTQ checkpoints with the package gptqmodel and a GPU; vLLM needs nothing else.",
        )

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        rows, columns = shape
        per_word = 32 // scheme.bits
        for what, count in (("rows", rows), ("columns", columns)):
            if count % per_word:
                raise UsageError(
                    f"{name} has {count} {what}, and GPTQ packs {per_word} into a word; "
                    "use --format compressed-tensors."
                )
        module, groups = name.removesuffix("weight"), scheme.groups(columns)
        width = columns // groups
        return (
            StoredTensor(module + "qweight", "I32", (columns // per_word, rows), axis=1),
            StoredTensor(module + "scales", "F16", (groups, rows), axis=1),
            StoredTensor(module + "qzeros", "I32", (groups, rows // per_word), axis=1, per=per_word),
            StoredTensor(
                module + "g_idx", "I32", (columns,), constant=tuple(i // width for i in range(columns))
            ),
        )

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`."""
        import torch

        from ..packing import pack_int32

        module, bits = name.removesuffix("weight"), tensor.scheme.bits
        rows, groups = tensor.scale.shape
        zeros = torch.full((groups, rows * bits // 32), self._zeros(bits), dtype=torch.int32)
        return {
            module + "qweight": pack_int32(tensor.codes, bits).t(),
            module + "scales": tensor.scale.t(),
            module + "qzeros": zeros.to(tensor.codes.device),
        }

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`."""
        from ..packing import unpack_int32

        module, bits = weight.name.removesuffix("weight"), weight.scheme.bits
        if not bool((stored[module + "qzeros"] == self._zeros(bits)).all()):
            raise SourceError(
                f"{module}qzeros holds other zero points than {_FORMATS[self.version]} has for symmetric weights; "
                "is checkpoint_format in config.json right?"
            )
        codes = unpack_int32(stored[module + "qweight"].t().contiguous(), bits, weight.shape[1])
        return QuantizedTensor(codes, stored[module + "scales"].t().contiguous(), None, weight.scheme)

    def _zeros(self, bits: int) -> int:
        """A word of zero points, as the signed integer that it is stored as."""
        zero = (1 << (bits - 1)) - (2 - self.version)
        word = sum(zero << shift for shift in range(0, 32, bits))
        return word - (1 << 32) if word >= 1 << 31 else word

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`."""
        return {
            "quantization_config": {
                "quant_method": "gptq",
                "checkpoint_format": _FORMATS[self.version],
                "bits": recipe.bits,
                "group_size": -1 if recipe.group_size == "row" else recipe.group_size,
                "desc_act": False,
                "sym": True,
                "lm_head": False,
            }
        }

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`."""
        section = _section(config)
        for key, expected in (("desc_act", False), ("sym", True), ("lm_head", False), ("dynamic", None)):
            if section.get(key, expected) not in (expected, None, {}):
                raise QuantizedSourceError(
                    f"config.json says that this GPTQ checkpoint has {key} {section[key]!r}, which glmquant cannot "
                    "read; use its 16-bit original."
                )
        try:
            group = section["group_size"]
            scheme = Scheme(section["bits"], None if group == -1 else group)
        except (KeyError, UsageError) as error:
            raise SourceError(
                f"quantization_config in config.json is damaged, or of a kind not known here ({error})."
            ) from None
        return [
            StoredWeight(tensor.name, scheme, (tensor.shape[0], tensor.shape[1]))
            for tensor in family.in_layout(dims, family.layout_of(config))
            if tensor.role is Role.LINEAR
        ]


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("quantization_config")
    return section if isinstance(section, Mapping) else {}
