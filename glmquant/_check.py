"""Whether a checkpoint stays within limits, predicted from its headers or measured by running it."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from . import hub
from ._open import PathLike
from .checkpoint.files import read_json
from .checkpoint.output import REPORT
from .checkpoint.source import open_folder
from .errors import GlmquantError, ModelError, UsageError
from .memory import Memory, Model, Workload, check_context, estimate, longest_context
from .recipe import show_size

if TYPE_CHECKING:
    from ._evaluate import Evaluation, Progress


@dataclass(frozen=True)
class Gate:
    """One limit and what was found: `found` may be at most `limit`, in bytes or (KL divergence) in nats.

    Where nothing could be found, `fault` says why; there may be no limit then, but that the model has to run.
    """

    name: str
    found: float | None
    limit: float | None
    unit: Literal["bytes", "nats"] = "bytes"
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.found is not None and self.limit is not None and self.found <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "fault" or value} | {
            "ok": self.ok
        }

    def __str__(self) -> str:
        if self.found is None or self.limit is None:
            return self.fault
        verb = "is within" if self.ok else "exceeds"
        if self.unit == "nats":
            return f"{self.found:.4g} nats {verb} {self.limit:.4g}"
        found, limit = show_size(int(self.found)), show_size(int(self.limit))
        if found == limit and not self.ok:  # by less than what is shown
            return f"{found} {verb} it by {self.found - self.limit:.0f} bytes"
        return f"{found} {verb} {limit}"


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        gates: the limits, in the order of the command line.
        memory: the prediction.
        workload: what it is for.
        longest: longest context within the memory limit.
        device: ``cuda`` or ``cpu``.
        measured: figures of a run, in bytes; None without one.
        evaluation: against the reference; None without one.
    """

    gates: tuple[Gate, ...]
    memory: Memory
    workload: Workload
    longest: int
    device: str
    measured: dict[str, int] | None
    evaluation: Evaluation | None = None

    @property
    def ok(self) -> bool:
        """Whether all limits hold."""
        return all(gate.ok for gate in self.gates)

    @property
    def prediction_error(self) -> dict[str, float]:
        """Predicted / measured - 1 by figure."""
        predicted = {"allocated": self.memory.allocated, "process": self.memory.peak}
        found = self.measured or {}
        return {name: round(predicted[name] / found[name] - 1, 4) for name in predicted if found.get(name)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ok": self.ok,
            "device": self.device,
            "context": self.workload.context,
            "batch": self.workload.batch,
            "gates": [gate.to_json() for gate in self.gates],
            "predicted": self.memory.to_json(),
            "longest_context": self.longest,
            "measured": self.measured,
            "prediction_error": self.prediction_error,
            "evaluation": self.evaluation.to_json() if self.evaluation else None,
        }

    def to_junit(self, name: str) -> bytes:
        """A JUnit report: one test case for each limit, of a suite called `name`."""
        failures = sum(not gate.ok for gate in self.gates)
        suite = ElementTree.Element(
            "testsuite", name=name, tests=str(len(self.gates)), failures=str(failures), errors="0"
        )
        for gate in self.gates:
            case = ElementTree.SubElement(suite, "testcase", classname="glmquant.check", name=gate.name)
            if not gate.ok:
                ElementTree.SubElement(case, "failure", message=f"{gate.name}: {gate}")
        written: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        return written + b"\n"


def check(
    out: PathLike,
    *,
    memory_limit: int | None = None,
    context: int | None = None,
    batch: int | None = None,
    max_file_size: int | None = None,
    max_kld: float | None = None,
    reference: PathLike | None = None,
    text: PathLike | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    measure: bool = False,
    progress: Progress | None = None,
) -> Check:
    """Hold the checkpoint `out` against limits.

    What is not given is taken from the budget that ``convert --fit`` recorded in its report.

    Args:
        out: the folder.
        memory_limit: bytes that the process may take at its peak, loading included.
        context: tokens of prompt and answer.
        batch: sequences at a time.
        max_file_size: bytes of the largest weight file.
        max_kld: mean KL divergence from `reference`, in nats for each predicted token; see `glmquant.evaluate`.
        reference: what `out` was made from.
        text: what the two read; None is the sample that `glmquant.evaluate` uses.
        device: where it is to run.
        measure: load and run it in a process of its own, and gate on what that takes: the peak of its resident memory
            on a CPU, torch's peak and NVML's figure for the process on a GPU. A run that fails is a gate that does.
        progress: of the evaluation.

    Raises:
        SourceError: it is no whole checkpoint of a known family.
        UsageError: no limit, a context beyond the model's, or nothing to measure on.
    """
    if max_kld is None and (reference is not None or text is not None):
        raise UsageError("--reference and --text say what --max-kld X is held against; give it too.")
    if max_kld is not None:
        if reference is None:
            raise UsageError("--max-kld needs what the model was made from; give --reference SRC.")
        if not 0 <= max_kld < math.inf:
            raise UsageError(f"--max-kld {max_kld} makes no sense; use nats for each token, such as 0.05.")
    folder = hub.local_folder(out)
    source = open_folder(folder)
    model = Model.of_checkpoint(source)
    recorded = _recorded_fit(folder / REPORT)
    limit = memory_limit or recorded.get("budget")
    if limit is None and max_file_size is None and max_kld is None:
        raise UsageError(
            "there is nothing to check against; give --vram SIZE (or --max-file-size SIZE, --max-kld X)."
        )
    context = context or recorded.get("context") or min(2048, model.dims.context)
    workload = Workload(context, batch or recorded.get("batch") or 1)
    check_context(model, workload.context)
    memory = estimate(model, workload, "glmquant", device)
    measured: dict[str, int] | None = None
    gates: list[Gate] = []
    if measure:
        gates, measured = _measured(str(folder), workload, device, limit)
    elif limit is not None:
        gates.append(Gate(f"{_name(device)}, predicted", memory.peak, limit))
    if max_file_size is not None:
        largest = max(path.stat().st_size for path in source.files)
        gates.append(Gate("largest file", largest, max_file_size))
    evaluation = None
    if max_kld is not None and reference is not None:
        from ._evaluate import evaluate

        window = min(512, model.dims.context)
        where = "cpu" if device == "cpu" else "auto"
        try:
            evaluation = evaluate(folder, reference, text, window=window, device=where, progress=progress)
        except ModelError as error:
            gates.append(Gate("KL divergence", None, max_kld, "nats", str(error).rstrip(".")))
        else:
            gates.append(Gate("KL divergence", evaluation.kl_mean.value, max_kld, "nats"))
    longest = longest_context(model, workload, limit, "glmquant", device) if limit else model.dims.context
    return Check(tuple(gates), memory, workload, longest, device, measured, evaluation)


def _recorded_fit(report: Any) -> dict[str, int]:
    """Budget, context and batch of ``convert --fit``; empty if there was none."""
    if not report.exists():
        return {}
    recipe = read_json(report).get("recipe")
    fit = recipe.get("fit") if isinstance(recipe, dict) else None
    found = fit if isinstance(fit, dict) else {}
    return {
        key: found[key]
        for key in ("budget", "context", "batch")
        if type(found.get(key)) is int and found[key] > 0
    }


def _name(device: str) -> str:
    return "memory" if device == "cpu" else "VRAM"


def _measured(
    folder: str, workload: Workload, device: str, limit: int | None
) -> tuple[list[Gate], dict[str, int] | None]:
    """The gates of a run, and its figures."""
    found = _run(folder, workload, device)
    if "fault" in found:
        asked = f"{found['fault']} ({workload.batch} x {workload.context} tokens on {device})"
        return [Gate(f"{_name(device)}, measured", None, limit, fault=asked)], None
    of = {"nvml": "VRAM, process by NVML", "device": "VRAM, all of the GPU's"}.get(found.pop("of"))
    if limit is None:
        return [], found
    gates = [Gate("VRAM, torch's peak", found["allocated"], limit)] if device != "cpu" else []
    return [*gates, Gate(of or "memory, measured", found["process"], limit)], found


def _run(folder: str, workload: Workload, device: str) -> dict[str, Any]:
    """Load and run the checkpoint in a fresh process; see `glmquant._measured_run`, and ``fault`` if that failed."""
    command = [sys.executable, "-m", "glmquant._measured_run", folder, device]
    command += [str(workload.context), str(workload.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    if done.returncode == GlmquantError.exit_status and lines:
        raise UsageError(lines[-1])
    if done.returncode == -signal.SIGKILL:
        return {"fault": "it was killed while it ran, most likely because memory ran out"}
    if done.returncode < 0:
        return {"fault": f"it was ended by signal {-done.returncode}"}
    reason = (done.stderr.strip().splitlines() or ["for no stated reason"])[-1]
    return {"fault": f"it could not be run: {reason[:200].rstrip('.')}"}
