"""Runs inside a peer's environment: ``python quality_peer_worker.py JOB``.

JOB is a JSON file with the name of the ``peer``, a native ``source`` folder, ``windows`` (a safetensors file with
``ids`` [windows, tokens]), ``options``, and where to write ``out``: the linear weights, by their names in the source,
as the peer would multiply with them. What is not said here is left as the project has it by default; models are held
in float32. Nothing of ours can be imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
Job = dict[str, Any]


def auto_round(job: Job) -> Weights:
    """Rounding and clipping learnt by signed gradients, block by block."""
    from auto_round import AutoRound  # type: ignore[import-not-found]

    options = job["options"]
    ids = _windows(job)
    rounding = AutoRound(
        _model(job), tokenizer=_tokenizer(job), scheme="W4A16", group_size=64, sym=options["symmetric"],
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
        nsamples=len(ids), seqlen=ids.shape[1], iters=options["iterations"], batch_size=options["batch"],
        lr=options.get("rate"), device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    model, _ = rounding.quantize()
    return _linear(model)


def llm_compressor(job: Job) -> Weights:
    """Its GPTQ."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

    ids = _windows(job)
    weights = {"num_bits": 4, "type": "int", "symmetric": job["options"]["symmetric"], "strategy": "group",
               "group_size": 64}  # fmt: skip
    model = _model(job)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1], num_calibration_samples=len(ids), shuffle_calibration_samples=False,
    )  # fmt: skip
    return _linear(model)


def gptqmodel(job: Job) -> Weights:
    """Its GPTQ."""
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # type: ignore[import-not-found]
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format  # type: ignore[import-not-found]

    config = QuantizeConfig(
        bits=4, group_size=64, sym=job["options"]["symmetric"], offload_to_disk=False, device="cpu"
    )
    model = GPTQModel.load(job["source"], config, dtype=torch.float32, backend="torch")
    ids = _windows(job)
    model.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], backend="torch"
    )
    # packed as the first version stores it, whose zero points are one less than what it multiplies with
    hf_convert_gptq_v1_to_v2_format(model.model, 4, TorchLinear, "gptq", {})
    found: Weights = {}
    for name, module in model.model.named_modules():
        if isinstance(module, TorchLinear):
            module.post_init()
            found[f"{name}.weight"] = module.eval().dequantize_weight().T.float()
    for name in [name for name in found if ".gate_proj." in name]:
        joined = [found.pop(name), found.pop(name.replace("gate_proj", "up_proj"))]
        found[name.replace("gate_proj", "gate_up_proj")] = torch.cat(joined)
    return found


def hqq(job: Job) -> Weights:
    """Zero points optimised, without data."""
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

    def quantized(weight: Tensor) -> Any:
        packed, meta = Quantizer.quantize(
            weight, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(packed, meta)

    return {name: quantized(weight) for name, weight in _stored(job)}


def nf4(job: Job) -> Weights:
    """The quantizer of bitsandbytes."""
    from bitsandbytes import functional

    return {
        name: functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        for name, weight in _stored(job)
    }


def ggml(job: Job) -> Weights:
    """The package gguf, which writes what llama.cpp writes without an importance matrix."""
    import gguf

    kind = gguf.GGMLQuantizationType[job["options"]["kind"]]
    return {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
        for name, weight in _stored(job)
    }


PEERS: dict[str, Callable[[Job], Weights]] = {
    "auto_round": auto_round, "llm_compressor": llm_compressor, "gptqmodel": gptqmodel, "hqq": hqq, "nf4": nf4,
    "gguf": ggml,
}  # fmt: skip


def _stored(job: Job) -> Iterator[tuple[str, Tensor]]:
    """The linear weights as the source has them, float32."""
    for name, weight in load_file(Path(job["source"]) / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            yield name, weight.float()


def _model(job: Job) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    return model.eval()


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["source"])


def _windows(job: Job) -> Tensor:
    ids: Tensor = load_file(job["windows"])["ids"]
    return ids


def _linear(model: nn.Module) -> Weights:
    """The weights of the linear layers of the blocks."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if ".layers." in name and name.endswith("_proj.weight")
    }


def main() -> None:
    """See the module."""
    job = json.loads(Path(sys.argv[1]).read_text())
    os.chdir(Path(job["out"]).parent)  # where some leave logs
    torch.set_num_threads(1)
    found = PEERS[job["peer"]](job)
    save_file({name: weight.cpu().float().contiguous().clone() for name, weight in found.items()}, job["out"])


if __name__ == "__main__":
    main()
