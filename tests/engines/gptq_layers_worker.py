"""Runs inside gptqmodel's environment: ``python gptq_layers_worker.py JOB``.

JOB is a JSON file with ``folders`` and ``layers`` (numbers). In every folder it leaves the weights of these layers as
gptqmodel reads them: ``read.safetensors``, and ``control.safetensors``, for which it was told the wrong version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def read(stored: dict[str, torch.Tensor], module: str, config: dict[str, Any], version: str) -> torch.Tensor:
    """The weight [out, in] of a module of a checkpoint of this version."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # type: ignore[import-not-found]
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format  # type: ignore[import-not-found]

    state = {name.removeprefix(module): t for name, t in stored.items() if name.startswith(module)}
    words, rows = state["qweight"].shape
    layer = TorchLinear(
        bits=config["bits"], group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"],
        in_features=words * 32 // config["bits"], out_features=rows, bias="bias" in state,
    )  # fmt: skip
    layer.load_state_dict(state)
    hf_convert_gptq_v1_to_v2_format(torch.nn.ModuleList([layer]), config["bits"], TorchLinear, version, {})
    layer.post_init()
    weight: torch.Tensor = layer.eval().dequantize_weight().T.contiguous()
    return weight


def main() -> None:
    """See the module."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for folder in map(Path, job["folders"]):
        stored = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        modules = [
            name.removesuffix("qweight")
            for name in stored
            if name.endswith("qweight") and int(name.split(".")[2]) in job["layers"]
        ]
        version = config["checkpoint_format"]
        other = "gptq" if version == "gptq_v2" else "gptq_v2"
        for file, told in (("read", version), ("control", other)):
            weights = {f"{module}weight": read(stored, module, config, told) for module in modules}
            save_file(weights, folder / f"{file}.safetensors")


if __name__ == "__main__":
    main()
