"""How fast what ``convert`` writes runs, and in how much memory, by the harness of ``glmquant bench``.

Converts a checkpoint (ChatGLM3-6B's first eight layers in random weights, unless another is given) to INT4 and INT8,
and measures both, the original, and the INT4 weights multiplied as THUDM's code does. GGUF files of the same weights
may be added.

    python -m benchmarks.runtimes [--source DIR] [--gguf FILE ...] [--prompt N] [--new N] [--batch N ...] [--out FILE]

Prints the table of ``glmquant bench``; the last line is the name of the JSON file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import glmquant
from glmquant import Recipe
from glmquant.bench import harness, report
from glmquant.bench.cases import Candidate, Workload

from . import synthetic

RESULTS = Path(__file__).parent / "results"
RECIPES = {"int4-g128": Recipe(), "int8-g128": Recipe(bits=8)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source", type=Path, help="a checkpoint in 16 bit; default: eight layers of ChatGLM3-6B"
    )
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="the same weights for llama.cpp")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmquant-bench")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    source = options.source or synthetic.build(options.folder / "chatglm3-6b-8-layers", "chatglm3-6b", 8)
    candidates = []
    for name, recipe in RECIPES.items():
        out = glmquant.convert(source, options.folder / f"{source.name}-{name}", recipe, force=True).out
        candidates.append(Candidate(str(out), "glmquant", options.device, options.dtype))
    candidates.append(Candidate(candidates[0].path, "dequantize", options.device, options.dtype))
    candidates.append(Candidate(str(source), "glmquant", options.device, options.dtype))
    candidates += [Candidate(str(file), "llama.cpp", options.device) for file in options.gguf]
    workload = Workload(options.prompt, options.new, tuple(options.batch), 1, options.repetitions)
    found = harness.run(
        candidates, workload, lambda done, total, name: print(f"{done}/{total} {name}", flush=True)
    )
    for result in found["results"]:  # no paths of this machine
        result["candidate"]["path"] = Path(result["candidate"]["path"]).name
    document = options.out or RESULTS / f"run-{source.name}.json"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(json.dumps({"model": source.name, **found}, indent=1) + "\n")
    print(report.text(found))
    print(document)


if __name__ == "__main__":
    main()
