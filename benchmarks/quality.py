"""What every recipe costs in quality, measured on a real language model.

The model is the stand-in of `benchmarks.standin`, lean and with a change of basis: SmolLM2-135M as a ChatGLM3. Small
models suffer more from quantization than large ones, so the figures tell methods apart, and are no forecast for six
billion parameters. Its hidden size is 576, which groups of 128 do not divide.

Calibrated methods read the first half of TEXT. Everything is judged on the second half, and on OTHER, a text of another
kind of which nothing was seen, by what `glmquant eval` measures.

    python -m benchmarks.quality [--text TEXT] [--other OTHER] [--source DIR] [--windows N] [--only ROW]... [--out FILE]

TEXT is the bundled sample of WikiText-2 unless another is given. Rows that OUT holds already, measured on the same
windows, are kept: a slow machine may do them one by one. A peer that cannot be run here has a row that says why. Prints
a line for each row; the last line is the name of the JSON file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, quality_peers
from benchmarks.quality_peers import PEERS
from glmquant import _evaluate, _fit, _open, _sensitivity, families
from glmquant._windows import Windows, cut, read_text
from glmquant.bench import environment
from glmquant.formats.compressed_tensors import CompressedTensors
from glmquant.models.blocks import BlockwiseModel
from glmquant.models.building import open_checkpoint
from glmquant.recipe import CALIBRATED, Calibration
from glmquant.tokenizers.loading import load_tokenizer

RESULTS = Path(__file__).parent / "results"
CALIBRATION_WINDOWS = 24  # of 512 tokens, and not the default 64; random tokens come on top
G64 = ("--group-size", "64")
RECIPES: dict[str, tuple[str, ...]] = {
    "INT8, row, thudm": ("--bits", "8", "--format", "cpm"),
    "INT8, row, mse": ("--bits", "8", "--group-size", "row"),
    "INT4, row, thudm": ("--format", "cpm"),
    "INT4, row, gptq": ("--format", "cpm", "--method", "gptq"),
    "INT4, g64, rtn": (*G64, "--method", "rtn"),
    "INT4, g64, mse": G64,
    "INT4, g64, hqq, asymmetric": (*G64, "--method", "hqq", "--asymmetric"),
    "INT4, g64, weighted-mse": (*G64, "--method", "weighted-mse"),
    "INT4, g64, gptq": (*G64, "--method", "gptq"),
    "INT4, g64, awq": (*G64, "--method", "awq"),
    "INT4, g64, awq-gptq": (*G64, "--method", "awq-gptq"),
    "INT4, g64, gptq, random tokens": (*G64, "--method", "gptq", "--calibration", "random"),
    "INT4, g64, gptq, asymmetric": (*G64, "--method", "gptq", "--asymmetric"),
    "INT4, g32, rtn": ("--group-size", "32", "--method", "rtn"),
    "INT4, g32, mse": ("--group-size", "32"),
    "INT4, g32, mse, asymmetric": ("--group-size", "32", "--asymmetric"),
    "INT4, g32, gptq": ("--group-size", "32", "--method", "gptq"),
}
MIXED = {
    f"{bits} bits on average, {method}": (bits, method)
    for method in ("mse", "gptq")
    for bits in (4.25, 4.5, 5, 6)
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="a stand-in that is there already")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, on which every row is judged")
    parser.add_argument("--only", action="append", help="a row; * stands for anything")
    parser.add_argument("--keep", type=Path, help="a folder for what was converted, to go on from")
    parser.add_argument("--convert-only", action="store_true", help="into --keep, and judge another time")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glmquant-quality-") as folder:
        root = Path(folder)
        source = options.source or _build(root / "standin")
        text = read_text(options.text)
        seen = root / "first-half.txt"
        seen.write_text(text[: len(text) // 2], encoding="utf-8")
        texts = {"same kind": text[len(text) // 2 :]}
        if options.other is not None:
            texts["another kind"] = read_text(options.other, second_half=True)
        judge = Judge(source, texts, options.windows, options.keep)
        calibration = Calibration(str(seen), CALIBRATION_WINDOWS)
        given = quality_peers.Given(source, calibration, (options.keep or root) / "peers")
        trials = _kept(options.out, judge.windows)
        for name in (*RECIPES, *MIXED, *PEERS):
            if name in trials or not any(fnmatchcase(name, wanted) for wanted in options.only or "*"):
                continue
            out = (options.keep or root) / name.replace(" ", "").replace(",", "-")
            noted = out.with_name(out.name + ".cost.json")
            if noted.exists():
                cost = json.loads(noted.read_text())
            elif name in PEERS:
                try:
                    cost = quality_peers.make(name, given, out)
                except quality_peers.Missing as error:
                    trials[name] = {"recipe": name, "missing": str(error)}
                    _save(options.out, judge.windows, trials)
                    print(json.dumps(trials[name]), flush=True)
                    continue
            elif name in MIXED:
                cost = _mixed(source, out, *MIXED[name], seen)
            else:
                cost = _converted(source, out, RECIPES[name], seen)
            noted.write_text(json.dumps(cost))
            if options.convert_only:
                continue
            trials[name] = {"recipe": name, **cost, **judge(out)}
            print(json.dumps(trials[name]), flush=True)
            _save(options.out, judge.windows, trials)
            if options.keep is None:
                shutil.rmtree(out)
    print(options.out)


def _build(folder: Path) -> Path:
    command = [sys.executable, "-m", "benchmarks.standin", str(folder), "--basis-change"]
    subprocess.run(command, check=True)
    return folder


def _save(file: Path, windows: Any, trials: dict[str, Any]) -> None:
    apart = "" if file.stem == "quality" else f" ({file.stem.removeprefix('quality-')})"
    result = {
        "benchmark": "quality",
        "model": f"SmolLM2-135M-Instruct as ChatGLM3, lean, with a change of basis{apart}",
        **environment.describe(),
        "note": "Rows that were there already are kept: commit and versions are those of the latest run.",
        "windows": windows,
        "trials": [trials[known] for known in (*RECIPES, *MIXED) if known in trials]
        + [trials.get(known) or _missing(file, known) for known in PEERS],
        "summary": summarize(trials),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


def _missing(file: Path, peer: str) -> dict[str, str]:
    """The row of a peer that has none, with the reason that an earlier run gave."""
    known = json.loads(file.read_text())["trials"] if file.exists() else []
    before = (row for row in known if row["recipe"] == peer and "missing" in row)
    return next(before, {"recipe": peer, "missing": "was not asked for"})


def _kept(file: Path, windows: Any) -> dict[str, Any]:
    """Rows that were measured on the same windows."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    same = found.get("windows") == windows
    return {trial["recipe"]: trial for trial in found["trials"] if same and "missing" not in trial}


class Judge:
    """Holds checkpoints against the source, whose part is computed once.

    Args:
        source: the 16-bit checkpoint.
        texts: by the name of their kind.
        windows: of 512 tokens, spread evenly over each text.
        keep: a folder for what the source computes.
    """

    def __init__(self, source: Path, texts: dict[str, str], windows: int, keep: Path | None) -> None:
        self._kept = None if keep is None else keep / "source.pt"
        tokenizer = load_tokenizer(source)
        self._cut: dict[str, Windows] = {}
        for name, text in texts.items():
            whole = cut(text, tokenizer, 512)
            count = min(windows, len(whole.ids))
            ids = whole.ids[[number * len(whole.ids) // count for number in range(count)]]
            self._cut[name] = Windows(ids, whole.prefix, whole.stride, whole.scored)
        self.windows = {
            name: [len(found.ids), 512, hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()[:16]]
            for name, found in self._cut.items()
        }
        self._model = BlockwiseModel(open_checkpoint(source), torch.float32, "cpu")

    @cached_property
    def _exact(self) -> dict[str, list[Tensor]]:
        if self._kept is not None and self._kept.exists():
            known: dict[str, Any] = torch.load(self._kept)
            if known["windows"] == self.windows:
                states: dict[str, list[Tensor]] = known["states"]
                return states
        found = self._hidden(self._model)
        if self._kept is not None:
            torch.save({"windows": self.windows, "states": found}, self._kept)
        return found

    def _hidden(self, model: BlockwiseModel) -> dict[str, list[Tensor]]:
        # All texts at once: every block is read once.
        states = model.hidden_states(
            torch.cat([found.ids for found in self._cut.values()]), lambda name: None
        )
        split = {}
        for name, found in self._cut.items():
            split[name], states = states[: len(found.ids)], states[len(found.ids) :]
        return split

    def __call__(self, out: Path) -> dict[str, Any]:
        """Figures by kind of text; see `glmquant.Evaluation`."""
        model = BlockwiseModel(open_checkpoint(out), torch.float32, "cpu")
        states = self._hidden(model)
        figures = {}
        for name, windows in self._cut.items():
            found = [self._exact[name], states[name]]
            loss, divergence, same = _evaluate._compare([self._model, model], found, windows)
            mean = _evaluate.Estimate.mean
            figures[name] = {
                "source_perplexity": asdict(mean(loss[0].mean(-1)).exp()),
                "perplexity": asdict(mean(loss[1].mean(-1)).exp()),
                "perplexity_ratio": asdict(mean((loss[1] - loss[0]).mean(-1)).exp()),
                "kl_mean": asdict(mean(divergence.mean(-1))),
                "top1_agreement": asdict(mean(same.mean(-1))),
            }
        return figures


def _converted(source: Path, out: Path, arguments: tuple[str, ...], seen: Path) -> dict[str, Any]:
    """Run ``glmquant convert`` as a process of its own; what it cost, and the bits of the linear layers."""
    calibrated = set(CALIBRATED) & set(arguments) and "--calibration" not in arguments
    given: tuple[str, ...] = ("--calibration", str(seen)) if calibrated else ()
    given += ("--calibration-windows", str(CALIBRATION_WINDOWS)) if set(CALIBRATED) & set(arguments) else ()
    command = [sys.executable, "-m", "glmquant.cli", "convert", str(source), str(out), *arguments, *given]
    return _measured([*command, "--resume", "--json"], source, out)


def _mixed(source: Path, out: Path, bits: float, method: str, seen: Path) -> dict[str, Any]:
    """Bits and groups for every layer, so that linear layers take `bits` for each weight on average."""
    opened = _open.open_source(source)
    calibration = Calibration(str(seen), CALIBRATION_WINDOWS) if method in CALIBRATED else None
    units = _sensitivity.measure(source, method, calibration=calibration).units
    dtype = families.stated_dtype(opened.source.config)
    options = [_fit._options(unit, dtype, CompressedTensors()) for unit in units]
    weights = sum(unit.shape[0] * unit.shape[1] for unit in units)
    spare = int(bits * weights / 8) - sum(found[0].nbytes for found in options)
    keys = [found[0].key for found in options]
    for step in _fit.spend(options, spare)[0]:
        keys[step.unit] = step.after.key
    choices = [[unit.name, list(unit.tensors), *key] for unit, key in zip(units, keys, strict=True)]
    script = (
        "import json, sys, glmquant; from glmquant.recipe import *; source, out, method, seen, choices = sys.argv[1:]\n"
        "fit = Fit(1, 1, choices=tuple(Choice(n, tuple(t), b, g) for n, t, b, g in json.loads(choices)))\n"
        f"calibration = Calibration(seen, {CALIBRATION_WINDOWS}) if method in CALIBRATED else None\n"
        "recipe = Recipe(method=method, fit=fit, calibration=calibration)\n"
        "print(json.dumps(glmquant.convert(source, out, recipe, force=True, resume=True).report))"
    )
    return _measured(
        [sys.executable, "-c", script, str(source), str(out), method, str(seen), json.dumps(choices)],
        source,
        out,
    )


def _measured(command: list[str], source: Path, out: Path) -> dict[str, Any]:
    """What a conversion that prints its report cost, and the bits for each weight of the linear layers. The time of one
    that goes on from an interrupted one is not known.
    """
    resumed = out.with_name(out.name + ".partial").exists()
    found = measure.run(command)
    report = json.loads(found.output)
    specs = quality_peers.linear_specs(source)
    weights = sum(spec.shape[0] * spec.shape[1] for spec in specs)
    parts = {part.name for spec in specs for part in spec.native} | {spec.name for spec in specs}
    stored = sum(entry["bytes"] for name, entry in report["tensors"].items() if name in parts)
    return {
        "linear_bits": round(8 * stored / weights, 3),
        "seconds": None if resumed else round(found.seconds, 1),
        "cpu_seconds": None if resumed else round(found.cpu_seconds, 1),
        "peak_anonymous_mib": found.peak_anonymous_bytes >> 20,
    }


def summarize(trials: dict[str, Any]) -> dict[str, float]:
    """The ratios by which methods are judged: KL divergence to that of rtn, same groups."""
    ratios = {}
    for name, trial in trials.items():
        yardstick = trials.get(", ".join([*name.split(", ")[:2], "rtn"]))
        for kind in ("same kind", "another kind"):
            if yardstick is not None and kind in trial:
                ratio = trial[kind]["kl_mean"]["value"] / yardstick[kind]["kl_mean"]["value"]
                ratios[f"{name} / rtn, {kind}"] = round(ratio, 3)
    return ratios


if __name__ == "__main__":
    main()
