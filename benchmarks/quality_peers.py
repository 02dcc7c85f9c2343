"""Other projects' quantizers on the same weights: what each makes of the linear layers, as the weights it stands for.

All are given the model in the native layout, and those that calibrate the very windows of token ids that our own
calibrated methods read. Each runs as a process of its own, most in an environment of their own, which is built on first
use as those of `tests.engines` are. What comes back are weights; none of their kernels is used to judge them.

Bits for each weight count scales of 16 bit and, where zero points are searched, 4 bit for each of them, which is what
the formats hold that all of these are stored in (`hqq` and its like: as the project itself stores them); those of
llama.cpp are from its file. Symmetric is what auto-round and gptqmodel do unless told otherwise, and llm-compressor in
its scheme W4A16.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import glmquant
from benchmarks import measure, quality_llama
from glmquant import Recipe, _open, families
from glmquant.calibration import calibration_text
from glmquant.families import TensorSpec
from glmquant.recipe import Calibration
from tests.engines.environments import Environment, EnvironmentFailed

_WORKER = Path(__file__).with_name("quality_peer_worker.py")
_SETTINGS = (
    "HF_HUB_OFFLINE=1",
    "CUDA_VISIBLE_DEVICES=",
    "GPTQMODEL_CPU_WORKERS=2",
    "GPTQMODEL_DISABLE_PACK_EXT=1",
)
_DATASETS = (
    "datasets==5.1.0",
    "pyarrow==26.0.0",
    "pandas==3.0.3",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "tzdata",
)
_AUTO_ROUND = Environment(
    "auto-round", (), "auto-round==0.16.1", besides=("py-cpuinfo==9.0.0", *_DATASETS), beside_ours=True
)
_LLM_COMPRESSOR = Environment(
    "llm-compressor", (), "llmcompressor==0.14.0.1",
    besides=("transformers==5.17.0", "huggingface-hub==1.33.0", "compressed-tensors==0.19.0", "auto-round==0.15.1",
             "py-cpuinfo==9.0.0", *_DATASETS),
    beside_ours=True,
)  # fmt: skip
_GPTQMODEL = Environment(
    "gptqmodel-quantizer", (), "gptqmodel==7.7.0",
    besides=("defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4", "threadpoolctl==3.8.0",
             "tokenicer==0.0.14", "torchao==0.18.0", *_DATASETS),
    beside_ours=True,
)  # fmt: skip
_HQQ = Environment("hqq", (), "hqq==0.2.8.post1", besides=("termcolor", "einops"), beside_ours=True)


class Missing(Exception):
    """A peer gave nothing here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Who quantizes.

    Attributes:
        worker: a function of `benchmarks.quality_peer_worker`, or ``llama.cpp``.
        bits: for each weight; None is what its file says.
        options: of the worker.
        environment: None is ours.
    """

    worker: str
    bits: float | None
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Environment | None = None


_SYMMETRIC, _ASYMMETRIC = 4 + 16 / 64, 4 + (16 + 4) / 64
_TUNED = {"symmetric": True, "iterations": 200, "batch": 8}
PEERS: dict[str, Peer] = {
    "llama.cpp Q4_0 (gguf)": Peer("gguf", 4.5, {"kind": "Q4_0"}),
    "llama.cpp Q4_1 (gguf)": Peer("gguf", 5.0, {"kind": "Q4_1"}),
    "llama.cpp Q4_0, imatrix": Peer("llama.cpp", None, {"kind": "Q4_0"}),
    "llama.cpp Q4_1, imatrix": Peer("llama.cpp", None, {"kind": "Q4_1"}),
    "llama.cpp Q4_K_M, imatrix": Peer("llama.cpp", None, {"kind": "Q4_K_M"}),
    "bitsandbytes nf4, blocks of 64": Peer("nf4", 4.5),
    "hqq, g64, asymmetric": Peer("hqq", 4.5, environment=_HQQ),
    "gptqmodel, g64": Peer("gptqmodel", _SYMMETRIC, {"symmetric": True}, _GPTQMODEL),
    "gptqmodel, g64, asymmetric": Peer("gptqmodel", _ASYMMETRIC, {"symmetric": False}, _GPTQMODEL),
    "llm-compressor GPTQ, g64": Peer("llm_compressor", _SYMMETRIC, {"symmetric": True}, _LLM_COMPRESSOR),
    "llm-compressor GPTQ, g64, asymmetric": Peer(
        "llm_compressor", _ASYMMETRIC, {"symmetric": False}, _LLM_COMPRESSOR
    ),
    # its recipes of these names
    "auto-round opt-rtn, g64": Peer("auto_round", _SYMMETRIC, {**_TUNED, "iterations": 0}, _AUTO_ROUND),
    "auto-round light, g64": Peer(
        "auto_round", _SYMMETRIC, {**_TUNED, "iterations": 50, "rate": 5e-3}, _AUTO_ROUND
    ),
    # an eighth of the work of light, for slow machines
    "auto-round light, one window a step, g64": Peer(
        "auto_round", _SYMMETRIC, {**_TUNED, "iterations": 50, "rate": 5e-3, "batch": 1}, _AUTO_ROUND
    ),
    "auto-round, g64": Peer("auto_round", _SYMMETRIC, _TUNED, _AUTO_ROUND),
}


class Given:
    """What all peers are given.

    Args:
        source: the 16-bit checkpoint.
        calibration: as our own calibrated methods have it.
        folder: for the native layout of it and what peers leave behind.
    """

    def __init__(self, source: Path, calibration: Calibration, folder: Path) -> None:
        self._source, self._calibration, self.folder = source, calibration, folder.absolute()

    @cached_property
    def native(self) -> Path:
        """One safetensors file."""
        out = self.folder / "native"
        if not out.exists():
            glmquant.convert(self._source, out, Recipe(bits=16), device="cpu")
        return out

    @cached_property
    def windows(self) -> Path:
        """A safetensors file with ``ids`` [windows, tokens]."""
        dims = families.detect(config := _open.open_source(self._source).source.config).dims(config)
        file = self.folder / "windows.safetensors"
        ids = calibration_text(self._calibration, self._source, dims.context).ids
        save_file({"ids": ids.contiguous()}, file)
        return file


def make(name: str, given: Given, out: Path) -> dict[str, Any]:
    """Write a native 16-bit checkpoint with linear layers as the peer called `name` has them; returns what it cost.

    Raises:
        Missing: it could not be installed, or failed.
    """
    peer = PEERS[name]
    work = given.folder / f"{out.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        if peer.worker == "llama.cpp":
            folder = given.folder / "llama.cpp"
            read = quality_llama.importance(given.native, given.windows, folder)
            weights, bits, cost = quality_llama.quantized(
                given.native, folder, peer.options["kind"], work / "out.gguf"
            )
            cost = measure.together([read, cost])
        else:
            assert peer.bits is not None
            cost = _worked(peer, given, work)
            weights, bits = load_file(work / "weights.safetensors"), peer.bits
        _write(weights, given.native, out)
    except (EnvironmentFailed, quality_llama.MissingProgram, SystemExit) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Missing(said[-1] if said else repr(error)) from None
    finally:
        shutil.rmtree(work)
    return {
        "linear_bits": round(bits, 3),
        "seconds": round(cost.seconds, 1),
        "cpu_seconds": round(cost.cpu_seconds, 1),
        "peak_anonymous_mib": cost.peak_anonymous_bytes >> 20,
        **({} if peer.environment is None else {"package": peer.environment.package}),
    }


def _worked(peer: Peer, given: Given, work: Path) -> measure.Measured:
    python = sys.executable
    if peer.environment is not None:
        peer.environment.ensure(lambda said: print(said, file=sys.stderr))
        python = str(peer.environment.python)
    job = work / "job.json"
    job.write_text(
        json.dumps(
            {
                "peer": peer.worker,
                "source": str(given.native),
                "windows": str(given.windows),
                "options": peer.options,
                "out": str(work / "weights.safetensors"),
            }
        )
    )
    return measure.run(["env", *_SETTINGS, python, str(_WORKER), str(job)])


def _write(weights: dict[str, Tensor], native: Path, out: Path) -> None:
    """The checkpoint `native` with other linear weights, in its dtype."""
    tensors = load_file(native / "model.safetensors")
    if wrong := sorted(weights.keys() ^ {name for name in tensors if name.endswith("_proj.weight")}):
        raise Missing(f"it should have quantized the linear layers, and did not agree about {wrong[0]}")
    for name, weight in weights.items():
        tensors[name] = weight.to(tensors[name].dtype).view(tensors[name].shape)
    shutil.copytree(native, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def linear_specs(source: Path) -> list[TensorSpec]:
    """The linear weights of a checkpoint."""
    config = _open.open_source(source).source.config
    family = families.detect(config)
    return [spec for unit in family.units(family.dims(config)) for spec in unit.tensors]
