"""gptqmodel: its own reader of GPTQ layers.

Its loader takes no native GLM checkpoint but its own: it wants the MLP's gate and up projection apart, which
transformers' model has in one, and vLLM with it. So it is asked layer by layer, for the weights that it would multiply
with.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file

from . import checkpoints, reference
from .base import EngineFailed
from .checkpoints import Checkpoint
from .environments import Environment

_WORKER = Path(__file__).with_name("gptq_layers_worker.py")
_SECONDS = 300
_LAYERS = (0, 15, 29)
_GPTQ = ("--format", "gptq")


class GptqModel:
    """See the module."""

    name = "gptqmodel"
    environment = Environment(
        name="gptqmodel",
        first=(),
        package="gptqmodel==7.7.0",
        besides=("defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4", "threadpoolctl==3.8.0",
                 "tokenicer==0.0.14", "torchao==0.18.0"),
        beside_ours=True,
    )  # fmt: skip
    checkpoints: Sequence[Checkpoint] = (
        Checkpoint("GPTQ INT4 group 64, layers", (*_GPTQ, "--group-size", "64"), "float16", "-"),
        Checkpoint("GPTQ INT8 per row, layers", (*_GPTQ, "--bits", "8", "--group-size", "row"), "float16", "-"),
        Checkpoint("GPTQ v2 group 32, layers", (*_GPTQ, "--gptq-version", "2", "--group-size", "32"), "float16", "-"),
    )  # fmt: skip

    def missing(self) -> str | None:
        """See `tests.engines.base.Engine`."""
        return None

    def compare(
        self, chosen: Sequence[Checkpoint], source: Path, work: Path
    ) -> Iterator[tuple[str, list[str], str]]:
        """Convert, and have all of them read at once: the start of gptqmodel takes longest.

        Returns:
            A name, what is wrong, and figures; a control follows each first version.
        """
        folders = [work / f"gptq-{number}" for number in range(len(chosen))]
        for folder, checkpoint in zip(folders, chosen, strict=True):
            checkpoints.convert(source, folder, checkpoint)
        answers = self._read(folders, work)
        for folder, checkpoint, (plain, other) in zip(folders, chosen, answers, strict=True):
            ours = {name: values for name, values in reference.weights(folder) if name in plain}
            differing = [name for name, values in plain.items() if not values.equal(ours[name].half())]
            faults = [f"{differing[0]} and {len(differing) - 1} more differ"] if differing else []
            if len(plain) != 6 * len(_LAYERS):
                faults.append(f"{len(plain)} weights instead of {6 * len(_LAYERS)}")
            yield checkpoint.name, faults, f"{len(plain)} weights, {len(plain) - len(differing)} equal"
            same = sum(values.equal(ours[name].half()) for name, values in other.items())
            unnoticed = ["the comparison did not notice"] if same else []
            yield f"{checkpoint.name}: control, read as the other version", unnoticed, f"{same} equal"

    def _read(self, folders: Sequence[Path], work: Path) -> list[tuple[dict, dict]]:  # type: ignore[type-arg]
        job, log = work / "gptqmodel-job.json", work / "gptqmodel-log.txt"
        job.write_text(json.dumps({"folders": [str(folder) for folder in folders], "layers": _LAYERS}))
        settings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        settings |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as stream:
            try:
                status = subprocess.run(
                    [self.environment.python, _WORKER, job],
                    stdout=stream, stderr=stream, env=settings, timeout=_SECONDS, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise EngineFailed(f"no answer after {_SECONDS} seconds") from None
        if status:
            raise EngineFailed(
                f"gptqmodel ended with status {status}: {log.read_text(errors='replace')[-400:]}"
            )
        return [(load_file(f / "read.safetensors"), load_file(f / "control.safetensors")) for f in folders]
