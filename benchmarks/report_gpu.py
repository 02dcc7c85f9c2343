"""The part of benchmarks/REPORT.md about a GPU, from what `benchmarks.gpu` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Table = list[list[str]]


def tables(result: dict[str, Any]) -> Iterator[str | Table]:
    """Texts and tables, in order. What a section did not give is said, and nothing is made up for it."""
    status = result.get("tests_status")
    yield "Tests on the GPU: " + (
        "not run" if status is None else "passed" if status == 0 else f"FAILED ({status})"
    )
    for name, make in _SECTIONS.items():
        section = result.get(name)
        if section is None:
            continue
        rows = [row for row in section["results"] if "failed" not in row]
        if rows:
            yield from make(rows)
        for row in [row for row in section["results"] if "failed" in row]:
            about = ", ".join(str(row[key]) for key in ("shape", "way", "recipe", "device") if key in row)
            yield f"Not measured: {about}: {row['failed'].splitlines()[-1]}"
        if "failed" in section:
            yield f"The section {name} is not complete: {section['failed'].splitlines()[-1]}"
    ratios = [[what, f"{value:.2f}"] for what, value in _ratios(result)]
    if ratios:
        yield [["ratio", ""], *ratios]


def _bandwidth(rows: list[Row]) -> Iterator[str | Table]:
    yield [["copies", "GB/s"], *([row["what"], f"{row['GB/s']:.0f}"] for row in rows if "GB/s" in row)]


def _matmul(rows: list[Row]) -> Iterator[str | Table]:
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        here = [row for row in rows if tuple(row["shape"]) == shape]
        counts = sorted({row["rows"] for row in here})
        yield f"Products with a weight of {shape[0]} x {shape[1]}, microseconds by rows of activations:"
        table = [["", *map(str, counts), "GB/s at 1", "worst error", "same bits twice"]]
        for way in dict.fromkeys(row["way"] for row in here):
            mine = {row["rows"]: row for row in here if row["way"] == way}
            cells = [f"{mine[m]['us']:.1f}" if m in mine else "" for m in counts]
            first = f"{mine[1]['GB/s']:.0f}" if 1 in mine else ""
            error = max(row["error"] for row in mine.values())
            same = "yes" if all(row["same_again"] for row in mine.values()) else "no"
            table.append([way, *cells, first, f"{error:.1e}", same])
        yield table


def _columns(*wanted: tuple[str, str, str]) -> Callable[[list[Row]], Iterator[str | Table]]:
    """A table of what each row has by a key, under a title, in a format."""

    def make(rows: list[Row]) -> Iterator[str | Table]:
        yield [
            [title for title, _, _ in wanted],
            *(
                ["" if row.get(key) is None else format(row[key], spec) for _, key, spec in wanted]
                for row in rows
            ),
        ]

    return make


_SECTIONS: dict[str, Callable[[list[Row]], Iterator[str | Table]]] = {
    "bandwidth": _bandwidth,
    "matmul": _matmul,
    "end_to_end": _columns(
        ("weights", "precision", ""), ("way", "way", ""), ("batch", "batch", ""),
        ("prompt, tokens/s", "prefill_tokens/s", ".0f"), ("tokens/s", "tokens/s", ".1f"),
        ("ms/token", "ms/token", ".3f"), ("weights read, GB/s", "weights_GB/s", ".0f"),
        ("loaded, MiB", "resident_MiB", ""), ("peak by torch, MiB", "peak_allocated_MiB", ""),
        ("on the GPU by NVML, MiB", "device_used_MiB", ""),
    ),
    "convert": _columns(
        ("recipe", "recipe", ""), ("device", "device", ""), ("first run", "first", ""), ("seconds", "seconds", ".1f"),
        ("processor seconds", "cpu_seconds", ".1f"), ("GB/s", "GB/s", ".2f"), ("same bytes", "same_bytes", ""),
    ),
    "memory": _columns(
        ("recipe", "recipe", ""), ("batch", "batch", ""), ("tokens", "context", ""), ("load, s", "load_seconds", ".1f"),
        ("predicted, MiB", "predicted_MiB", ""), ("measured, MiB", "measured_MiB", ""),
        ("error, %", "error_percent", ".2f"),
    ),
    "kernels": _columns(("kernel", "what", ""), ("shape", "shape", ""), ("ms", "ms", ".3f"), ("GB/s", "GB/s", ".0f")),
}  # fmt: skip


def _ratios(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Those that this project is held to, as far as there are figures for them."""

    def found(section: str, **wanted: Any) -> Row | None:
        rows = result.get(section, {}).get("results", [])
        return next((r for r in rows if "failed" not in r and wanted.items() <= r.items()), None)

    copies = found("bandwidth", what="device to device")
    int4, bf16 = (found("end_to_end", precision=p, way="graph", batch=1) for p in ("int4", "bf16"))
    thudm = found("end_to_end", precision="int4", way="thudm", batch=1)
    if copies and int4:
        yield "int4, batch 1: weights read / copy bandwidth", int4["weights_GB/s"] / copies["GB/s"]
    if int4 and bf16:
        yield "int4 / bf16, tokens/s at batch 1", int4["tokens/s"] / bf16["tokens/s"]
        yield "int4 / bf16, prompt of 2048 tokens", int4["prefill_tokens/s"] / bf16["prefill_tokens/s"]
    if int4 and thudm:
        yield (
            "int4 / unpacking all, then multiplying (THUDM), tokens/s at batch 1",
            int4["tokens/s"] / thudm["tokens/s"],
        )
    for peer in ("humming int4-g128", "thudm int4-g128", "bf16"):
        worst: list[float] = []
        for row in result.get("matmul", {}).get("results", []):
            if row["way"] == "int4-g128" and row.get("rows", 17) <= 16:
                theirs = found("matmul", shape=row["shape"], way=peer, rows=row["rows"])
                worst += [row["us"] / theirs["us"]] if theirs else []
        if worst:
            yield f"int4 product / {peer}, time, 1 to 16 rows, the worst", max(worst)
