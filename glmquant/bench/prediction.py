"""What `glmquant.memory` expects of a candidate, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import hub
from ..checkpoint.source import TORCH_NAMES, open_folder
from ..errors import GlmquantError
from ..memory import Model, estimate
from ..memory import Workload as Asked
from .cases import Result, Workload

_KNOWN = ("glmquant", "16bit")  # other peers have no arithmetic in `glmquant.memory`


def predict(result: Result, workload: Workload) -> dict[str, Any] | None:
    """`Memory.to_json` for the largest batch, on the device and in the dtype of `result`; None if there is nothing."""
    runtime = result.candidate.runtime
    if runtime not in _KNOWN or result.error is not None:
        return None
    # The last token is written and not read.
    asked = Asked(workload.prompt + workload.new - 1, max(workload.batches), prompt=workload.prompt)
    try:
        model = Model.of_checkpoint(open_folder(hub.local_folder(result.candidate.path)))
    except GlmquantError:  # it ran all the same
        return None
    model = replace(model, dtype=next(key for key, name in TORCH_NAMES.items() if name == result.dtype))
    model = model.unpacked() if runtime == "16bit" else model
    return estimate(model, asked, device="cpu" if result.device == "cpu" else "cuda").to_json()
