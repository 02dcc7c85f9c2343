"""What every recipe costs in quality, measured by ``glmquant eval`` on a real language model.

The model is the stand-in of `benchmarks.standin`, lean and with a change of basis: SmolLM2-135M as a ChatGLM3. Small
models suffer more from quantization than large ones, so the figures tell methods apart, and are no forecast for six
billion parameters. Its hidden size is 576, which groups of 128 do not divide.

    python -m benchmarks.quality [--source DIR] [--text FILE --second-half] [--windows N] [--out FILE]

Prints a line for each recipe; the last line is the name of the JSON file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import glmquant
from glmquant import Recipe
from glmquant.bench import environment

RESULTS = Path(__file__).parent / "results"
RECIPES = {
    "INT8, row, thudm": Recipe(bits=8, format="cpm"),
    "INT8, row, mse": Recipe(bits=8, group_size="row"),
    "INT4, row, thudm": Recipe(format="cpm"),
    "INT4, g64, rtn": Recipe(group_size=64, method="rtn"),
    "INT4, g64, mse": Recipe(group_size=64),
    "INT4, g32, rtn": Recipe(group_size=32, method="rtn"),
    "INT4, g32, mse": Recipe(group_size=32),
    "INT4, g32, mse, asymmetric": Recipe(group_size=32, symmetric=False),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, help="a stand-in that is there already")
    parser.add_argument("--text", type=Path, help="default: the sample that glmquant bundles")
    parser.add_argument("--second-half", action="store_true", help="of the text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-standin.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glmquant-quality-") as folder:
        source = options.source or _build(Path(folder) / "standin")
        trials = []
        for name, recipe in RECIPES.items():
            trials.append(_trial(name, recipe, source, Path(folder) / "out", options))
            print(json.dumps(trials[-1]), flush=True)
    result = {
        "benchmark": "quality",
        "model": "SmolLM2-135M-Instruct as ChatGLM3, lean, with a change of basis",
        **environment.describe(),
        "trials": trials,
        "summary": summarize(trials),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


def _build(folder: Path) -> Path:
    command = [sys.executable, "-m", "benchmarks.standin", str(folder), "--basis-change"]
    subprocess.run(command, check=True)
    return folder


def _trial(name: str, recipe: Recipe, source: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    summary = glmquant.convert(source, out, recipe, force=True).report["summary"]
    started = time.perf_counter()
    found = glmquant.evaluate(
        out,
        source,
        options.text,
        second_half=options.second_half,
        window=options.window,
        windows=options.windows,
        device="cpu",
    ).to_json()
    seconds = time.perf_counter() - started
    paths = ("out", "source")  # of this machine
    return {
        "recipe": name,
        "bits_per_weight": summary["bits_per_weight"],
        "mean_relative_error": summary["mean_relative_error"],
        **{key: value for key, value in found.items() if key not in paths},
        "text": Path(found["text"]).name,
        "seconds": round(seconds, 1),
    }


def summarize(trials: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios by which methods are judged: KL divergence of mse to that of rtn, same groups."""
    divergence = {trial["recipe"]: trial["kl_mean"]["value"] for trial in trials}
    return {
        f"kl_mean, mse / rtn, {group}": round(
            divergence[f"INT4, {group}, mse"] / divergence[f"INT4, {group}, rtn"], 3
        )
        for group in ("g64", "g32")
    }


if __name__ == "__main__":
    main()
