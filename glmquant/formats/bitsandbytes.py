"""bitsandbytes, as transformers stores it: nf4 (4 bit, by a table) and int8.

For a weight [out, in] in nf4, with ``n = out*in`` and blocks of 64 along the rows:

    weight                                 uint8 [n/2, 1]   two indices of the table, the EVEN element in the HIGH half
    weight.absmax                          float32 [n/64]   with double quantization uint8
    weight.quant_map                       float32 [16]     the table
    weight.nested_absmax                   float32 [ceil(n/64/256)]       double quantization only
    weight.nested_quant_map                float32 [256]                  double quantization only
    weight.quant_state.bitsandbytes__nf4   JSON, as bytes

and in int8, where a weight is ``code * SCB / 127``:

    weight          int8 [out, in]
    SCB             float32 [out]     largest magnitude of each row
    weight_format   uint8 []          0
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.sink import StoredTensor
from ..errors import SourceError, UsageError
from ..families import Role
from ..recipe import Group, Recipe
from ..scheme import NF4, Nested, QuantizedTensor, Scheme
from .base import ROW, Abilities, FormatBase, StoredWeight, refuse_quantized_ends

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ..families import Dims, Family

_BLOCK = 64
_NESTED_BLOCK = 256
# What dequantizing gives there before it is cast to what the model computes in.
_DTYPE = "float16"
# JSON of a state with double quantization ends in a number whose length depends on the weights; spaces fill it up.
_NESTED_STATE_BYTES = 192
_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Bitsandbytes(FormatBase):
    """See the module.

    Attributes:
        double: nf4 with quantized scales.
        row_multiple: see `Format`. Scales that are quantized over a whole matrix have it encoded as a whole.
    """

    double: bool = False
    row_multiple: int = 1

    name = "bitsandbytes"
    abilities = Abilities(
        bits=(4, 8),
        groups=(64, "row"),
        methods=("bitsandbytes",),
        layouts=("native",),
        runtimes=("glmquant", "transformers"),
    )

    def detect(self, config: Mapping[str, Any]) -> bool:
        """See `Format`."""
        return _section(config).get("quant_method") == "bitsandbytes"

    def variant(self, config: Mapping[str, Any]) -> Self:
        """See `Format`."""
        return self._of(bool(_section(config).get("bnb_4bit_use_double_quant")))

    def chosen(self, recipe: Recipe) -> Self:
        """See `Format`."""
        return self._of(recipe.double_quant)

    def _of(self, double: bool) -> Self:
        return type(self)(double, 1 << 30 if double else 1)

    def check(self, recipe: Recipe, family: Family) -> None:
        """See `Format`."""
        if "native" not in family.layouts:
            raise UsageError("no engine reads bitsandbytes weights of ChatGLM-6B; use --format cpm.")
        refuse_quantized_ends(recipe, "--format bitsandbytes keeps embedding and head in 16 bit")
        if recipe.double_quant and recipe.bits != 4:
            raise UsageError("--double-quant is for nf4; leave it out, or use --bits 4.")
        library()

    def default_group(self, recipe: Recipe) -> Group:
        """See `Format`."""
        return _BLOCK if recipe.bits == 4 else ROW

    def linear_scheme(self, recipe: Recipe, weight_dtype: str) -> Scheme:
        """See `Format`."""
        super().linear_scheme(recipe, weight_dtype)  # refuses what the format does not have
        wanted = self.default_group(recipe)
        if recipe.group_size not in (None, wanted):
            raise UsageError(
                f"--format bitsandbytes with --bits {recipe.bits} has groups of its own; use --group-size {wanted}."
            )
        return self._scheme(recipe.bits)

    def _scheme(self, bits: int) -> Scheme:
        if bits == 4:
            return Scheme(4, _BLOCK, scale_dtype="float32", book="nf4", double=self.double)
        return Scheme(8, scale_dtype="float32", book="llm.int8")

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        """See `Format`."""
        return ("transformers needs the packages bitsandbytes and accelerate to read it.",)

    def outputs(self, name: str, shape: tuple[int, int], scheme: Scheme) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        rows, columns = shape
        module = name.removesuffix("weight")
        if scheme.bits == 8:
            return (
                StoredTensor(name, "I8", shape),
                StoredTensor(module + "SCB", "F32", (rows,)),
                StoredTensor(module + "weight_format", "U8", (), constant=(0,)),
            )
        groups = scheme.groups(columns)
        scales = rows * groups
        codes = StoredTensor(name, "U8", (rows * columns // 2, 1), spread=columns // 2)
        table = StoredTensor(name + ".quant_map", "F32", (16,), constant=_float32(NF4))
        if not scheme.double:
            state = tuple(json.dumps(_state(shape)).encode())
            return (
                codes,
                StoredTensor(name + ".absmax", "F32", (scales,), spread=groups),
                table,
                StoredTensor(module + _STATE, "U8", (len(state),), constant=state),
            )
        return (
            codes,
            StoredTensor(name + ".absmax", "U8", (scales,), spread=groups),
            table,
            StoredTensor(name + ".nested_absmax", "F32", (-(-scales // _NESTED_BLOCK),), per=0),
            StoredTensor(name + ".nested_quant_map", "F32", (256,), per=0),
            StoredTensor(module + _STATE, "U8", (_NESTED_STATE_BYTES,), per=0),
        )

    def encode(self, name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """See `Format`."""
        import torch

        module = name.removesuffix("weight")
        if tensor.scheme.bits == 8:
            largest = tensor.scale.squeeze(1) * 127
            return {name: tensor.codes, module + "SCB": largest.half().float()}
        indices = (tensor.codes + 8).view(torch.uint8).view(-1, 2)
        stored = {name: (indices[:, :1] << 4) | indices[:, 1:]}
        nested = tensor.nested
        if nested is None:
            return stored | {name + ".absmax": tensor.scale.reshape(-1)}
        rows, columns = tensor.codes.shape
        state = json.dumps(_state((rows, columns)) | {
            "nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset
        }).encode().ljust(_NESTED_STATE_BYTES)  # fmt: skip
        return stored | {
            name + ".absmax": nested.codes,
            name + ".nested_absmax": nested.scale,
            name + ".nested_quant_map": nested.table,
            module + _STATE: torch.tensor(list(state), dtype=torch.uint8),
        }

    def decode(self, stored: Mapping[str, torch.Tensor], weight: StoredWeight) -> QuantizedTensor:
        """See `Format`."""
        import torch

        name, (rows, columns) = weight.name, weight.shape
        module = name.removesuffix("weight")
        if weight.scheme.bits == 8:
            scale = stored[module + "SCB"].unsqueeze(1) / 127
            return QuantizedTensor(stored[name].contiguous(), scale, None, weight.scheme)
        packed = stored[name].view(-1, 1)
        codes = (torch.cat([packed >> 4, packed & 0xF], 1).view(torch.int8) - 8).view(rows, columns)
        absmax = stored[name + ".absmax"]
        if not weight.scheme.double:
            return QuantizedTensor(codes, absmax.view(rows, -1), None, weight.scheme)
        try:
            offset = float(json.loads(bytes(stored[module + _STATE].tolist()))["nested_offset"])
        except (KeyError, TypeError, ValueError):
            raise SourceError(
                f"{module}{_STATE} is damaged; download or convert the checkpoint again."
            ) from None
        nested = Nested(absmax, stored[name + ".nested_absmax"], stored[name + ".nested_quant_map"], offset)
        return QuantizedTensor(codes, nested.scales().view(rows, -1), None, weight.scheme, nested=nested)

    def config(
        self, recipe: Recipe, family: Family, weights: Sequence[StoredWeight], left: Sequence[str]
    ) -> dict[str, Any]:
        """See `Format`."""
        four = recipe.bits == 4
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": four,
                "load_in_8bit": not four,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.double,
                "bnb_4bit_compute_dtype": _DTYPE,
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": list(left),
                "llm_int8_threshold": 6.0,
            }
        }

    def quantized(self, config: Mapping[str, Any], family: Family, dims: Dims) -> list[StoredWeight]:
        """See `Format`."""
        section = _section(config)
        four = bool(section.get("load_in_4bit"))
        kind = section.get("bnb_4bit_quant_type", "fp4")
        if four == bool(section.get("load_in_8bit")) or (four and kind != "nf4"):
            raise SourceError(
                f"quantization_config in config.json is damaged, or of a kind not known here (bitsandbytes, {kind!r})."
            )
        return [
            StoredWeight(tensor.name, self._scheme(4 if four else 8), (tensor.shape[0], tensor.shape[1]))
            for tensor in family.in_layout(dims, family.layout_of(config))
            if tensor.role is Role.LINEAR
        ]


def library() -> Any:
    """The functions of the package ``bitsandbytes``.

    Raises:
        UsageError: it is not installed, or does not work here.
    """
    # Its warnings are about kernels for running models.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except Exception as error:  # it looks for libraries and devices on import
        raise UsageError(
            f"--format bitsandbytes needs the package bitsandbytes ({error}): pip install 'glmquant[bnb]'."
        ) from None
    return functional


def _state(shape: tuple[int, int]) -> dict[str, Any]:
    return {"quant_type": "nf4", "blocksize": _BLOCK, "dtype": _DTYPE, "shape": list(shape)}


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(struct.unpack("f", struct.pack("f", value))[0] for value in values)


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("quantization_config")
    return section if isinstance(section, Mapping) else {}
