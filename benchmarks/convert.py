"""Speed and memory of ``glmquant convert`` on the real shapes, held against copying the same files.

Synthesizes a checkpoint (ChatGLM3-6B by default: 12.5 GB, 7 shards), then times in turn, everything up to and
including ``sync``, with the source in the page cache (warm) and not (cold):

* ``cp -r`` of the source,
* ``glmquant convert --bits 4 --group-size 128`` with rtn and with mse, hashing, errors and verification included,
* ``llama-quantize ... Q4_0`` of the same weights, where that program is on the PATH (or given by ``--llama``).

    python -m benchmarks.convert [--model M] [--layers N] [--trials 3] [--folder DIR] [--out FILE]

The ratios depend on the disk: ``cp`` writes as much as it reads, a conversion reads half as much again (it reads back
what it wrote) and writes little. So the rates of the disk, past the page cache, are measured in the same run.

Needs twice the size of the checkpoint on one disk. Prints a table; the last line is the name of the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmquant.bench import environment

from . import gguf_writer, measure, synthetic

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=synthetic.MODELS, default="chatglm3-6b")
    parser.add_argument("--layers", type=int, help="only the first N layers (8 make 4.3 GB)")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["rtn", "mse"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glmquant-bench")
    parser.add_argument(
        "--llama",
        default=shutil.which("llama-quantize"),
        help="program called as: PROGRAM IN.gguf OUT.gguf Q4_0",
    )
    parser.add_argument("--note", help="anything to be known about the machine, for the JSON")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    name = options.model + (f"-{options.layers}-layers" if options.layers else "")
    source = synthetic.build(options.folder / name, options.model, options.layers)
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    out = options.folder / "out"
    inputs = {"cp": source, **dict.fromkeys(options.methods, source)}
    commands = {"cp": ["cp", "-r", str(source), str(out)]}
    for method in options.methods:
        commands[method] = [
            sys.executable, "-m", "glmquant.cli", "convert", str(source), str(out), "--json",
            "--bits", "4", "--group-size", "128", "--method", method,
        ]  # fmt: skip
    if options.llama and synthetic.MODELS[options.model]["torch_dtype"] == "float16":
        inputs["llama-quantize"] = gguf_writer.write(source, options.folder / f"{name}-f16-gguf")
        commands["llama-quantize"] = [options.llama, str(inputs["llama-quantize"]), str(out), "Q4_0"]
    disk = [_disk(options.folder)]
    trials = _trials(commands, inputs, out, options.trials)
    disk.append(_disk(options.folder))
    result = {
        "benchmark": "convert",
        "model": name,
        "source_bytes": nbytes,
        "source_files": len(list(source.glob("*.safetensors"))),
        **environment.describe(),
        **({"note": options.note} if options.note else {}),
        "disk_before_and_after": disk,
        "trials": trials,
        "summary": summarize(trials),
        "breakdown": _breakdown(source, options.methods),
    }
    _print(result)
    document = options.out or RESULTS / f"convert-{name}.json"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(json.dumps(result, indent=1) + "\n")
    print(document)


def _trials(
    commands: dict[str, list[str]], inputs: dict[str, Path], out: Path, count: int
) -> list[dict[str, Any]]:
    trials = []
    for number in range(count):
        for cache in ("cold", "warm"):
            # Each trial begins with another program, so that none always follows the same one.
            for name in _rotated(list(commands), number):
                command = commands[name]
                _remove(out)
                os.sync()
                _set_cache(inputs[name], warm=cache == "warm")
                cost = measure.run(command, sync=True)
                trial = {
                    "what": name,
                    "cache": cache,
                    "trial": number,
                    "seconds": round(cost.seconds, 3),
                    "cpu_seconds": round(cost.cpu_seconds, 3),
                    "peak_anonymous_mib": round(cost.peak_anonymous_bytes / 2**20, 1),
                }
                print(json.dumps(trial), flush=True)
                trials.append(trial)
    _remove(out)
    return trials


def _disk(folder: Path, count: int = 256) -> dict[str, float]:
    """Gigabytes per second that `count` blocks of 4 MiB are written and read with, past the page cache."""
    path = folder / "disk-test"
    rates = {}
    for what, places in (
        ("write", ["if=/dev/zero", f"of={path}", "oflag=direct", "conv=fsync"]),
        ("read", [f"if={path}", "of=/dev/null", "iflag=direct"]),
    ):
        started = time.perf_counter()
        subprocess.run(["dd", *places, "bs=4M", f"count={count}", "status=none"], check=True)
        rates[f"{what}_gb_per_s"] = round((count << 22) / (time.perf_counter() - started) / 1e9, 2)
    path.unlink()
    return rates


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_cache(source: Path, *, warm: bool) -> None:
    """Put a file, or those of a folder, into the page cache, or out of it (which anyone may do to clean pages)."""
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        with path.open("rb", buffering=0) as file:
            if warm:
                while file.read(16 << 20):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summarize(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians for each program and cache state, and the ratio to ``cp`` of the same trial and state."""
    summary: dict[str, Any] = {}
    copies = {(t["trial"], t["cache"]): t["seconds"] for t in trials if t["what"] == "cp"}
    for cache in ("cold", "warm"):
        for what in dict.fromkeys(t["what"] for t in trials):
            rows = [t for t in trials if t["what"] == what and t["cache"] == cache]
            summary[f"{what}.{cache}"] = {
                "median_seconds": round(statistics.median(t["seconds"] for t in rows), 2),
                "median_ratio_to_cp": round(
                    statistics.median(t["seconds"] / copies[t["trial"], cache] for t in rows), 3
                ),
                "worst_peak_anonymous_mib": max(t["peak_anonymous_mib"] for t in rows),
            }
    return summary


def _breakdown(source: Path, methods: list[str]) -> dict[str, float]:
    """Seconds that the parts of a conversion take by themselves, warm, on the largest shard scaled to the whole."""
    import torch

    from glmquant import _quantize, formats, quantizers
    from glmquant._hashing import sha256
    from glmquant._open import open_source
    from glmquant._workers import tuned_for_blocks
    from glmquant.plan import make_plan
    from glmquant.recipe import Recipe
    from glmquant.scheme import Scheme

    shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    _set_cache(source, warm=True)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    opened = open_source(source)
    plan = make_plan(opened.source, Recipe())
    fmt = formats.get("compressed-tensors")
    quantized = [item for item in plan.items if item.scheme]
    layer = [item for item in quantized if item.layer == 0]
    tasks = [task for item in layer for task in _quantize.tasks(item, fmt.row_multiple)]
    factor = sum(i.source_nbytes for i in quantized) / sum(i.source_nbytes for i in layer)

    def seconds(work: Callable[[], object]) -> float:
        work()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    scratch = source.parent / "write-test"
    size = min(1 << 30, plan.nbytes)

    def write() -> None:
        piece = b"\1" * (4 << 20)
        with scratch.open("wb", buffering=0) as file:
            for _ in range(size // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())

    parts = {
        "sha256_of_the_source_one_core": seconds(lambda: sha256(shard)) * total / shard.stat().st_size,
        "writing_and_fsync_of_the_result": seconds(write) * plan.nbytes / size,
    }
    parts["sha256_of_the_result_one_core"] = seconds(lambda: sha256(scratch)) * plan.nbytes / size
    parts["importing_torch"] = seconds(
        lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)
    )
    scratch.unlink()
    blocks = [opened.source.read(item.source, 0, 64) for item in layer]
    scheme, weights = Scheme(4, 128), sum(block.numel() for block in blocks)
    with tuned_for_blocks(), torch.inference_mode():
        for method in methods:
            quantizer = quantizers.get(method)
            parts[f"quantize_encode_compare_{method}_one_core"] = factor * seconds(
                lambda q=quantizer: [_quantize.run(t, opened.source, q, fmt) for t in tasks]  # type: ignore[misc]
            )
            alone = seconds(lambda q=quantizer: [q(b, scheme) for b in blocks])  # type: ignore[misc]
            everything = sum(i.source_nbytes for i in quantized) / 2
            parts[f"of_which_the_quantizer_{method}"] = alone * everything / weights
    return {name: round(value, 2) for name, value in parts.items()}


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}, {result['source_bytes'] / 1e9:.1f} GB in {result['source_files']} files")
    for disk in result["disk_before_and_after"]:
        print(f"disk: reads {disk['read_gb_per_s']} GB/s, writes {disk['write_gb_per_s']} GB/s")
    print(f"{'':<10} {'seconds':>9} {'x cp':>7} {'peak anonymous MiB':>20}")
    for name, row in result["summary"].items():
        peak = row["worst_peak_anonymous_mib"]
        print(f"{name:<10} {row['median_seconds']:>9.1f} {row['median_ratio_to_cp']:>7.2f} {peak:>20.0f}")
    for name, value in result["breakdown"].items():
        print(f"  {name}: {value} s")


if __name__ == "__main__":
    main()
