"""benchmarks/REPORT.md and its plots, from benchmarks/results/*.json and nothing else.

    python -m benchmarks.report [--results DIR] [--out REPORT.md]

A benchmark that is not known here is shown by its ``summary``. The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glmquant.bench import report as bench

from . import report_gpu

HERE = Path(__file__).parent
_TITLE = """# Measurements

Made by `make report` from [results](results/), which hold every trial, the commit, the hardware and the versions.
`make bench` measures anew. What each program does is said at its top; ratios within one run are worth more than
figures of different days.
"""

Result = dict[str, Any]
Section = Callable[[Result, Path], list[str]]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "REPORT.md")
    options = parser.parse_args()
    plots = options.out.parent / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(options.results, plots), encoding="utf-8")
    print(options.out)


def render(results: Path, plots: Path) -> str:
    """The text of the report; writes its plots into the folder `plots`."""
    parts = [_TITLE]
    for path in sorted(results.glob("*.json")):
        for name, result in _results(path):
            kind = str(result.get("benchmark"))
            section, verb = SECTIONS.get(kind, (_summary, kind))
            plot = plots / f"{name}.svg"
            plot.unlink(missing_ok=True)
            note = str(result.get("note", ""))
            short = f" ({note.partition(' (')[0]})" if note else ""
            parts += [f"## {verb}: {result.get('model', name)}{short}", *section(result, plot)]
            if plot.exists():
                parts.append(f"![{name}]({plots.name}/{plot.name})")
            parts += [f"Note: {note}."] * bool(note) + [_where(result, path)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _results(path: Path) -> Iterator[tuple[str, Result]]:
    """What a file holds, each with a name for its plot: one result, or one for each of several models."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if "models" not in result:
        yield path.stem, result
        return
    for model, found in result["models"].items():
        name = path.stem if len(result["models"]) == 1 else f"{path.stem}-{model}"
        yield name, {**found, "benchmark": result["benchmark"], "model": model}


def _where(result: Result, path: Path) -> str:
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    gpu = f", {hardware['gpu']} (driver {hardware.get('driver', '?')})" if "gpu" in hardware else ""
    named = ("torch", "transformers", "xllamacpp")
    software = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    return (
        f"Commit {str(result.get('commit', 'unknown'))[:12]}; {hardware.get('cpu', 'unknown CPU')}, "
        f"{hardware.get('cores', '?')} cores, {hardware.get('memory_gib', '?')} GiB{gpu}; {software}; "
        f"[{path.name}](results/{path.name})."
    )


def _convert(result: Result, plot: Path) -> list[str]:
    summary: dict[str, dict[str, float]] = result["summary"]
    whats = list(dict.fromkeys(key.rpartition(".")[0] for key in summary))
    trials = max(trial["trial"] for trial in result["trials"]) + 1
    rows = [["", "cold, s", "x cp", "warm, s", "x cp", "peak anonymous MiB"]]
    for what in whats:
        cold, warm = summary[f"{what}.cold"], summary[f"{what}.warm"]
        peak = max(cold["worst_peak_anonymous_mib"], warm["worst_peak_anonymous_mib"])
        name = what if what in ("cp", "llama-quantize") else f"convert --method {what}"
        cells = [f"{x[key]:.{digits}f}" for x in (cold, warm) for key, digits in _CONVERT_COLUMNS]
        rows.append([name, *cells, f"{peak:.0f}"])
    figure, axes = _figure()
    width = 0.4
    for number, cache in enumerate(("cold", "warm")):
        for place, what in enumerate(whats):
            seconds = [t["seconds"] for t in result["trials"] if (t["what"], t["cache"]) == (what, cache)]
            middle = statistics.median(seconds)
            spread = [[middle - min(seconds)], [max(seconds) - middle]]
            axes.bar(
                place + (number - 0.5) * width, middle, width, yerr=spread, capsize=3, color=f"C{number}",
                label=f"{cache} cache" if not place else None,
            )  # fmt: skip
    axes.set_xticks(range(len(whats)), whats)
    axes.set_ylabel("seconds, to the end of sync")
    axes.legend()
    _save(figure, plot)
    count = "one trial" if trials == 1 else f"medians of {trials} trials"
    size = f"{result['source_bytes'] / 1e9:.1f} GB in {result['source_files']} files"
    return [f"{size}, {count}.", _markdown(rows)]


_CONVERT_COLUMNS = (("median_seconds", 1), ("median_ratio_to_cp", 2))


def _stream(result: Result, plot: Path) -> list[str]:
    rows = [["", "seconds", "peak disk, GiB", "peak anonymous MiB"]]
    for name, found in result["median"].items():
        cells = [
            f"{found['seconds']:.1f}",
            f"{found['peak_disk'] / 2**30:.2f}",
            f"{found['peak_memory'] / 2**20:.0f}",
        ]
        rows.append([name, *cells])
    figure, axes = _figure()
    for place, name in enumerate(result["median"]):
        seconds = [trial[name]["seconds"] for trial in result["trials"]]
        middle = statistics.median(seconds)
        axes.barh(
            place, middle, xerr=[[middle - min(seconds)], [max(seconds) - middle]], capsize=3, color="C0"
        )
    axes.set_yticks(range(len(result["median"])), list(result["median"]))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    _save(figure, plot)
    rate, size = result["rate_bytes_per_second"] / 1e6, result["source_bytes"] / 1e9
    trials = len(result["trials"])
    text = f"{size:.1f} GB from a hub on the same machine that sends {rate:.0f} MB/s, medians of {trials} trials."
    return [text, _markdown(rows)]


def serve_table(result: Result) -> list[list[str]]:
    """By clients at a time, our server beside llama.cpp's, or alone; README has the same rows."""
    servers = list(dict.fromkeys(row["server"] for row in result["rows"]))
    rows = [["clients", "requests"]]
    for what in (
        "tokens per second",
        "first token, median",
        "between tokens, median",
        "same answer as alone",
    ):
        rows[0] += [what, *servers[1:]]
    for clients in dict.fromkeys(row["clients"] for row in result["rows"]):
        here = [row for row in result["rows"] if row["clients"] == clients]
        cells = [f"{clients}", f"{here[0]['requests']}"]
        cells += [f"{row['tokens_per_second']:.0f}" for row in here]
        cells += [f"{row['first_token_median']:.2f} s" for row in here]
        cells += [f"{1000 * row['between_tokens_median']:.0f} ms" for row in here]
        rows.append(cells + [f"{row['same']} of {row['requests']}" for row in here])
    return rows


def _serve(result: Result, plot: Path) -> list[str]:
    figure, axes = _figure()
    for server in dict.fromkeys(row["server"] for row in result["rows"]):
        found = [row for row in result["rows"] if row["server"] == server]
        speeds = [row["tokens_per_second"] for row in found]
        axes.plot([row["clients"] for row in found], speeds, marker="o", label=server)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("clients at a time")
    axes.set_ylabel("tokens per second of all together")
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, plot)
    lost, mixed = (sum(row[key] for row in result["rows"]) for key in ("lost", "mixed_up"))
    text = (
        f"Answers of {result['new_tokens']} tokens, {result['slots']} slots of {result['context']} tokens, "
        f"{result['threads']} threads. Weights: {result['weights']}. Beside it: {result['peer']}. Requests lost: "
        f"{lost}; answered with another's answer: {mixed}."
    )
    return [text, _markdown(serve_table(result))]


_TASKS = {"prefill": "prompt of 256", "decode 1": "1 sequence", "decode 4": "4 sequences"}
_PEERS = {"int4": "INT4, groups of 128", "int8": "INT8, groups of 128", "bf16": "bfloat16, PyTorch"}


def decode_table(result: Result) -> list[list[str]]:
    """Tokens per second of every peer, and ratios below each pair of them; README has the same rows."""
    summary = result["summary"]
    speeds: dict[str, dict[str, float]] = summary["tokens_per_second"]
    tasks = list(next(iter(speeds.values())))
    rows = [["tokens per second", *(_TASKS.get(task, task) for task in tasks)]]
    ratios = {key: value for key, value in summary.items() if " / " in key}
    order = [peer for pair in ratios for peer in (*pair.split(" / "), pair)]
    for name in [*order, *(peer for peer in speeds if peer not in order)]:
        label = "ratio within a round" if name in ratios else _PEERS.get(name, name)
        found = ratios.get(name) or speeds[name]
        rows.append([label, *(f"{found[task]:.{2 if name in ratios else 1}f}" for task in tasks)])
    return rows


def _cpu_decode(result: Result, plot: Path) -> list[str]:
    summary = result["summary"]
    figure, axes = _figure()
    speeds: dict[str, dict[str, float]] = summary["tokens_per_second"]
    tasks = list(next(iter(speeds.values())))
    width = 0.8 / len(speeds)
    for number, (peer, found) in enumerate(speeds.items()):
        places = [place + (number - (len(speeds) - 1) / 2) * width for place in range(len(tasks))]
        axes.bar(places, [found[task] for task in tasks], width, label=_PEERS.get(peer, peer))
    axes.set_xticks(range(len(tasks)), [_TASKS.get(task, task) for task in tasks])
    axes.set_ylabel("tokens per second")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    _save(figure, plot)
    trials = max(trial["trial"] for trial in result["trials"]) + 1
    rates = [["weights read at batch 1", "GB/s"]]
    rates += [[f"machine, {kind}", f"{rate:.1f}"] for kind, rate in summary["read_gb_per_second"].items()]
    for peer in speeds:
        if read := summary.get(f"{peer}, weights read at batch 1"):
            rates.append([_PEERS.get(peer, peer), f"{read['gb_per_second']:.1f}"])
    text = f"{result['threads']} threads, medians of {trials} rounds, in which all take turns."
    return [text, _markdown(decode_table(result)), _markdown(rates)]


def _quality(result: Result, plot: Path) -> list[str]:
    """Recipes that were judged on the kind of text that they were calibrated on, and on another."""
    kinds = [kind for kind in ("same kind", "another kind") if kind in result["windows"]]
    rows = [["", "bits per weight", "CPU seconds", "peak MiB"]]
    for kind in kinds:
        rows[0] += [f"{what}, {kind} of text" for what in ("KLD", "perplexity, x", "same top token")]
    figure, axes = _figure()
    missing = [f"{trial['recipe']} ({trial['missing']})" for trial in result["trials"] if "missing" in trial]
    for trial in result["trials"]:
        if "missing" in trial:
            continue
        cost = [trial.get("cpu_seconds"), trial.get("peak_anonymous_mib")]
        cells = [f"{trial['linear_bits']:.2f}", *("" if found is None else f"{found:.0f}" for found in cost)]
        for kind in kinds:
            found = trial[kind]
            cells += [_with_error(found["kl_mean"]), _with_error(found["perplexity_ratio"], 4)]
            cells.append(f"{100 * found['top1_agreement']['value']:.1f} %")
        rows.append([trial["recipe"], *cells])
        kl = trial["same kind"]["kl_mean"]
        axes.errorbar(
            trial["linear_bits"], kl["value"], yerr=kl["error"], fmt="o", capsize=3, label=trial["recipe"]
        )
    axes.set_xlabel("bits per weight of the linear layers")
    axes.set_ylabel("KL divergence, nats")
    axes.set_yscale("log")
    axes.legend(fontsize=5, ncols=2)
    _save(figure, plot)
    texts = ", ".join(f"{count} of {kind}" for kind, (count, _, _) in result["windows"].items())
    length = result["windows"]["same kind"][1]
    return [
        f"Windows of {length} tokens: {texts} of text as what was calibrated on; with standard errors. Bits are those "
        "of the linear layers, scales included. Peers are judged by the weights that theirs stand for.",
        _markdown(rows),
        *([f"Not measured: {'; '.join(missing)}."] if missing else []),
        *_summary(result, plot),
    ]


def _bench(result: Result, plot: Path) -> list[str]:
    if any(found["error"] is None for found in result["results"]):
        bench.plot(result, plot)
    return [bench.markdown(result)]


def _summary(result: Result, plot: Path) -> list[str]:
    """Whatever is a number or a text in ``summary``."""
    rows = [["", ""]]
    for key, value in (result.get("summary") or {}).items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"{key} {name}".strip(), _shown(found)] for name, found in inner]
    return [_markdown(rows)] if len(rows) > 1 else []


def _gpu(result: Result, plot: Path) -> list[str]:
    return [part if isinstance(part, str) else _markdown(part) for part in report_gpu.tables(result)]


SECTIONS: dict[str, tuple[Section, str]] = {
    "bench": (_bench, "Running"),
    "gpu": (_gpu, "On a GPU"),
    "convert": (_convert, "Converting"),
    "cpu-decode": (_cpu_decode, "Decoding on a CPU"),
    "quality": (_quality, "Quality"),
    "serve": (_serve, "Serving"),
    "stream": (_stream, "Converting while downloading"),
}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_error(figure: dict[str, Any], digits: int = 3) -> str:
    error = "" if figure["error"] is None else f" ± {figure['error']:.1g}"
    return f"{figure['value']:.{digits}g}{error}"


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    """As `glmquant.bench.report.plot` does: the same bytes for the same figures."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "glmquant", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
