"""``quantization_report.json``: what was done to what, and how well. No dates: same input, same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ._card import stated_facts
from ._open import OpenedSource
from ._sidecars import repository_name
from ._version import __version__
from .plan import Item, Plan

if TYPE_CHECKING:
    from ._quantize import ItemError
    from .formats.base import Rewritten

_PACKAGES = ("torch", "safetensors")


def item_entry(item: Item, error: ItemError) -> dict[str, Any]:
    """The report's line for one weight; errors to six digits; the sums behind them are good to about eight."""
    entry: dict[str, Any] = {"bytes": item.nbytes, "scheme": str(item.scheme) if item.scheme else None}
    if item.scheme is not None:
        entry["relative_error"] = float(f"{error.relative:.6g}")
    if item.decoded is not None:
        entry["decoded_from"] = str(item.decoded)
    if item.carried:
        entry["codes"] = "carried over"
    return entry


def build_report(
    plan: Plan,
    opened: OpenedSource,
    source_files: Mapping[str, Any],
    hashes: Mapping[str, str],
    sidecars: Mapping[str, bytes],
    entries: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    rewritten: Rewritten | None = None,
) -> dict[str, Any]:
    """Put the report together; `relative_error` is ``||w - w'|| / ||w||`` (Frobenius) throughout."""
    written = {shard.file: {"bytes": shard.nbytes, "sha256": hashes[shard.file]} for shard in plan.shards}
    if rewritten is not None:
        entries = {**entries, **rewritten.entries}
        written[rewritten.file] = {"bytes": rewritten.nbytes, "sha256": rewritten.sha256}
    nbytes = sum(int(str(entry["bytes"])) for entry in written.values())
    quantized = {name: e["relative_error"] for name, e in entries.items() if e["scheme"]}
    weights = sum(_elements(item.shape) for item in plan.items)
    summary: dict[str, Any] = {
        "bytes": nbytes,
        "source_bytes": plan.source_nbytes,
        "bits_per_weight": float(f"{8 * nbytes / weights:.4g}"),
    }
    if quantized:
        worst = max(quantized, key=lambda name: quantized[name])
        summary["mean_relative_error"] = float(f"{sum(quantized.values()) / len(quantized):.6g}")
        summary["worst_relative_error"] = quantized[worst]
        summary["worst_tensor"] = worst
    files = dict(written)
    for name, data in sorted(sidecars.items()):
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {
        "glmquant": __version__,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "model": plan.model,
        "family": plan.family,
        "recipe": plan.recipe.to_json(),
        **({} if rewritten is None else {"requantized": rewritten.tool}),
        **({} if calibration is None else {"calibration": calibration}),
        "source": {
            "stored_as": opened.stored_as.name,
            "adapter": opened.adapter is not None,
            **_origin(opened),
            "files": dict(source_files),
        },
        "files": files,
        "summary": summary,
        "tensors": {item.name: entries[item.name] for item in plan.items},
    }


def _origin(opened: OpenedSource) -> dict[str, Any]:
    """Where on a hub the source is, what its config.json calls it, and what its own card states."""
    origin = {"stated": stated_facts(opened.folder), "name": repository_name(opened.source.config)}
    found: dict[str, Any] = {key: value for key, value in origin.items() if value}
    if opened.remote is not None:
        ref = opened.remote.repository.ref
        found |= {"repository": f"{ref.hub}:{ref.name}", "commit": opened.remote.repository.commit}
    return found


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
