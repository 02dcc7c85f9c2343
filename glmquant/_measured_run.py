"""Load a checkpoint, compute a prompt and a few tokens, and print what memory that took: one line of JSON.

``python -m glmquant._measured_run FOLDER cpu|cuda CONTEXT BATCH``, in a process of its own, because peaks are those
of a process. The prompt and the answer fill the context; every sequence has the same length, and no padding.

The line is ``{"process": bytes, ...}``, or ``{"fault": "..."}`` where memory ran out or no numbers were computed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GlmquantError, ModelError

if TYPE_CHECKING:
    import torch

_NEW_TOKENS = 8


def main(folder: str, device: str, context: int, batch: int) -> int:
    """See the module; returns the exit status."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use here; measure with --device cpu, or leave out --measure.")
        return 2
    try:
        found = _figures(folder, device, context, batch)
    except ModelError as error:
        found = {"fault": str(error)}
    except GlmquantError as error:
        print(error)
        return error.exit_status
    except (MemoryError, RuntimeError, OSError) as error:
        from ._device import out_of_memory

        if not out_of_memory(error):
            raise
        found = {"fault": "memory ran out while it ran"}
    print(json.dumps(found))
    return 0


def _figures(folder: str, device: str, context: int, batch: int) -> dict[str, Any]:
    import torch

    from .models.loading import load

    model = load(folder, device=device)
    loaded, _ = _process_peak(device)
    new = min(_NEW_TOKENS, context - 1)
    ids = torch.full((batch, max(1, context - new)), 5, device=device)
    if model.config.model_type == "chatglm":  # whose prompt ends in [gMASK] <sop>
        ids[:, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    sums: list[torch.Tensor] = []

    def look(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        sums.append(
            logits.sum()
        )  # of what is no number, none; which takes no memory, as looking at each would
        return logits

    with torch.inference_mode():
        if new:
            options = {"max_length": None, "do_sample": False, "logits_processor": [look]}
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        else:
            look(ids, model(ids).logits.float())
    # A token that may not come yet has -inf.
    if any(bool(total.isnan() | (total == torch.inf)) for total in sums):
        raise ModelError("its logits are NaN or infinite; run `glmquant verify` on it")
    process, of = _process_peak(device)
    found = {"process": process, "process_loaded": loaded, "of": of}
    if device == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    return found


def _process_peak(device: str) -> tuple[int, str]:
    """Bytes that this process holds: its peak resident memory, or what it has on the GPU; and what they are of."""
    if device != "cpu":
        import torch

        chosen = torch.device(device)
        found = gpu_process_bytes(chosen)
        if found is None:  # of the whole device: right where nothing else uses it
            free, total = torch.cuda.mem_get_info(chosen)
            return int(total - free), "device"
        return found, "nvml"
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert match is not None
        return int(match[1]) * 1024, "process"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def gpu_process_bytes(device: torch.device) -> int | None:
    """What NVML says this process has on a GPU; None without NVML, or in a container that hides processes.

    NVML tells no peak; torch keeps what it has once reserved, so that the figure after a run is one.
    """
    import torch

    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        used = next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
    except pynvml.NVMLError:
        return None
    return None if used is None else int(used)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
