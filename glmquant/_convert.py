"""The one path: open, plan, quantize, write, verify, commit. Nothing else knows this order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native, families, formats
from ._card import folder_card
from ._flow import SourceShards, in_order
from ._hashing import BackgroundHasher, sha256
from ._open import OpenedSource, PathLike, open_source
from ._report import build_report, item_entry
from ._sidecars import sidecar_files, to_json
from ._version import __version__
from ._workers import cores, tuned_for_blocks
from .checkpoint.output import CARD, REPORT, OutputFolder, check_out, write_synced
from .checkpoint.sink import Begun, ShardedSink, ShardLayout, begun_shard
from .errors import OutOfMemoryError, OutputError, UsageError
from .plan import Plan, make_plan
from .recipe import SCALED, Recipe, show_size

if TYPE_CHECKING:
    from ._device import Gpu
    from ._quantize import Task
    from ._sensitivity import Measurement
    from .calibration import CalibrationText

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the name of what is being worked on."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        out: the folder that was written.
        plan: what was decided.
        report: the content of ``quantization_report.json``.
        hints: what this machine lacks to go faster, as sentences. Nothing of it shows in what was written.
    """

    out: Path
    plan: Plan
    report: dict[str, Any]
    hints: tuple[str, ...] = ()


def plan_conversion(
    source: PathLike,
    recipe: Recipe | None = None,
    *,
    adapter: PathLike | None = None,
    measurement: Measurement | PathLike | None = None,
    keep_source: bool = False,
    measuring: Progress | None = None,
) -> Plan:
    """What `convert` would do, from headers alone, unless there is a `Recipe.fit`: that measures the weights once.

    Raises:
        GlmquantError: whatever `convert` would refuse before it reads a weight.
    """
    opened = open_source(source, adapter)
    return make_plan(opened.source, _resolved(opened, recipe, measurement, keep_source, measuring))


def _resolved(
    opened: OpenedSource,
    recipe: Recipe | None,
    measurement: Measurement | PathLike | None,
    keep_source: bool,
    measuring: Progress | None,
) -> Recipe:
    recipe = recipe or Recipe()
    if recipe.fit is None or recipe.fit.choices:
        return recipe
    from ._fit import fitted
    from ._sensitivity import Measurement

    if measurement is not None and not isinstance(measurement, Measurement):
        measurement = Measurement.load(measurement)
    return fitted(opened, recipe, measurement=measurement, keep_source=keep_source, progress=measuring)


def convert(
    source: PathLike,
    out: PathLike,
    recipe: Recipe | None = None,
    *,
    adapter: PathLike | None = None,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
    keep_source: bool = False,
    measurement: Measurement | PathLike | None = None,
    progress: Progress | None = None,
    measuring: Progress | None = None,
) -> ConvertResult:
    """Quantize the checkpoint `source` into the new folder `out`.

    The same input gives the same bytes, whatever the device and the number of workers. Memory stays at a few dozen
    megabytes for each worker, whatever the size of the model.

    Args:
        source: a model folder, or a model on a hub (``hf:org/name``, ``ms:org/name``). Of the latter, the files of
            weights are fetched while others are quantized, and deleted when they are done with.
        out: the folder to write; it appears only when it is whole and verified.
        recipe: what to do; by default INT4 in groups of 128 columns, as compressed-tensors.
        adapter: a PEFT LoRA folder to merge first.
        device: where to quantize: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one that can be used. What does
            not fit into its memory is quantized on the CPU.
        workers: threads that quantize; by default one for each core this process may use, up to eight. While they
            run, torch works in one thread each, and glibc's malloc keeps freed memory; both hold for the process.
        resume: go on from the whole shards that an interrupted run left behind.
        force: replace an `out` that glmquant wrote before.
        keep_source: keep what is fetched from a hub, in the cache of the hub's own client.
        measurement: what `glmquant.measure` found for this source, or a file of it; for `Recipe.fit`, which otherwise
            measures itself (and keeps what it found, in the user's cache).
        progress: see `Progress`.
        measuring: the same for the measurement that `Recipe.fit` needs, counted in layers.

    Raises:
        GlmquantError: see `glmquant.errors`; `out` is as it was before.
    """
    if not os.fspath(out):  # which would be the current folder: an unset variable of a script
        raise UsageError("OUT is empty; name the folder to write.")
    opened = open_source(source, adapter)
    plan = make_plan(opened.source, _resolved(opened, recipe, measurement, keep_source, measuring))
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot work; use 1 or more.")
    if device not in ("auto", "cpu"):
        from ._device import find_gpu

        find_gpu(device)  # says now what is wrong, before anything is written
    folder = Path(os.path.abspath(Path(out).expanduser()))  # noqa: PTH100 - resolve() would follow links
    _check_places(opened, folder)
    check_out(folder, force=force)
    opened.fetch_sidecars()
    if opened.remote is not None:  # now that its vocabulary is here, which a GGUF file begins with
        plan = make_plan(opened.source, plan.recipe)
    files = sidecar_files(opened.folder, opened.source.config, plan)
    text = _calibration_text(plan, opened)
    summary = dict(text.summary) if text is not None else None
    where = None if text is None else (_device_type(device), text.threads)  # other ones give other bytes
    with OutputFolder(folder, _digest(plan, opened, summary, where), resume=resume, force=force) as output:
        finished = _whole_shards(output, plan)
        beside = opened.keep_in(None if keep_source else output.fetched)
        if text is not None:
            activations = 4 * text.ids.numel() * plan.dims.hidden
            beside += plan.nbytes + 3 * activations  # two old ones and a new one
        last = formats.of(plan.recipe).last_step(plan.recipe)
        if last is not None:
            beside += plan.nbytes  # more than the second file will take
        _check_room(plan, finished, output.partial, beside)
        # Hashing comes first: it has the second in which torch is loaded to itself.
        with (
            _telling_of_memory(),
            opened.fetching(),
            BackgroundHasher(opened.source.files) as hasher,
            tuned_for_blocks(),
        ):
            hashes, entries, hints = _write_weights(
                plan, opened, output, finished, device, workers or cores(), hasher, progress, text
            )
            source_files = {**opened.remote_files, **hasher.result()}
        if summary is not None and plan.recipe.method in SCALED:
            from .calibration import folded

            summary["folded"] = folded(output.calibrated, families.FAMILIES[plan.family], plan.dims)
        from . import _verify

        for name, data in files.items():
            write_synced(output.partial / name, data)
        if len(plan.shards) > 1:
            files["model.safetensors.index.json"] = index = to_json(_index(plan))
            write_synced(output.partial / "model.safetensors.index.json", index)
        _verify.check_written(output.partial, plan)
        if last is not None and progress is not None:
            progress(plan.source_nbytes, plan.source_nbytes, last.label)
        rewritten = None if last is None else last.run(output.partial, workers or cores())
        report = build_report(plan, opened, source_files, hashes, files, entries, summary, rewritten)
        write_synced(output.partial / REPORT, to_json(report))
        write_synced(output.partial / CARD, folder_card(output.partial))
        output.commit()
    return ConvertResult(folder, plan, report, hints)


def _write_weights(
    plan: Plan,
    opened: OpenedSource,
    output: OutputFolder,
    finished: dict[str, Any],
    device: str,
    workers: int,
    hasher: BackgroundHasher,
    progress: Progress | None,
    text: CalibrationText | None,
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Quantize and write every shard that is not finished; returns hashes by file, report entries by item, hints."""
    import torch

    from . import _device, _quantize, quantizers

    gpu, idle = _device.find_gpu(device) if plan.recipe.method else (None, None)
    fmt = formats.of(plan.recipe)
    quantizer = quantizers.data_free(plan.recipe.method) if plan.recipe.method else None
    shard_of = {tensor.name: shard for shard in plan.shards for tensor in shard.tensors}
    entries: dict[str, Any] = {}
    by_shard: dict[str, dict[str, Any]] = {shard.file: {} for shard in plan.shards}
    for file, entry in finished.items():
        entries.update(entry["items"])
        by_shard[file] = entry["items"]

    begun = _begun_shard(output, plan)
    if begun is not None and output.begun is not None:
        entries.update(output.begun["items"])
        by_shard[begun.file] = dict(output.begun["items"])

    def on_shard(file: str, digest: str) -> None:
        output.record(file, {"sha256": digest, "items": by_shard[file]})

    def keep_what_is_done() -> None:
        """Before a shard of the source is deleted: what came of it need not be made again."""
        found = sink.begun() if opened.deletes else None
        if found is not None:
            file, nbytes, digest = found
            output.record_begun(
                {"file": file, "bytes": nbytes, "sha256": digest, "items": dict(by_shard[file])}
            )

    sink = ShardedSink(
        output.partial,
        plan.shards,
        finished={file: entry["sha256"] for file, entry in finished.items()},
        begun=begun,
        on_shard=on_shard,
    )
    todo = []
    done = 0
    for item in plan.items:
        if shard_of[item.outputs[0].name].file in finished or item.name in entries:
            done += item.source_nbytes
        else:
            todo.extend(_quantize.tasks(item, fmt.row_multiple))
    hasher.consumed(done)
    if progress is not None:
        opened.on_fetched(
            lambda shard, got, size: progress(
                done, plan.source_nbytes, f"fetching {shard}, {100 * got // max(1, size)} %"
            )
        )
    shards = SourceShards(opened.source, todo, keep_what_is_done)
    prepared: Iterable[Task] = todo
    if text is not None:
        from .calibration import Calibrator

        prepared = Calibrator(
            opened,
            plan,
            text,
            quantizers.get(str(plan.recipe.method)),
            gpu.device if gpu else torch.device("cpu"),
            output.calibrated,
            lambda name: progress(done, plan.source_nbytes, name) if progress else None,
        ).prepared(todo)
    error = _quantize.ItemError()
    try:
        for task, result in in_order(
            prepared,
            workers,
            lambda t: _quantize.run(t, opened.source, quantizer, fmt, gpu),
            opened.stop_fetching,
        ):
            item = task.item
            error.add(result)
            if task.stop == (item.shape[0] if item.shape else 1):
                entry = item_entry(item, error)
                entries[item.name] = by_shard[shard_of[item.outputs[0].name].file][item.name] = entry
                error = _quantize.ItemError()
            for name, rows in result.rows.items():
                sink.write_rows(name, rows)
            shards.done(task)
            done += task.nbytes
            hasher.consumed(task.nbytes)
            if progress is not None:
                progress(done, plan.source_nbytes, item.name)
        return sink.close(), entries, tuple(_hints(plan, gpu, idle))
    except BaseException:
        sink.abandon()
        raise


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    """Says in a sentence that memory ran out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from ._device import out_of_memory

        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise OutOfMemoryError(
            f"memory ran out{f' ({reason})' if reason else ''}; what is done is kept. End what else takes memory, or "
            "use fewer --workers, and run the same command with --resume."
        ) from error


def _begun_shard(output: OutputFolder, plan: Plan) -> Begun | None:
    """The beginning of a shard that an interrupted run left, if it is as it was."""
    entry, found = output.begun, None
    if entry is not None and any(shard.file == entry["file"] for shard in plan.shards):
        found = begun_shard(output.partial / entry["file"], entry["bytes"], entry["sha256"])
    if entry is not None and found is None:
        output.record_begun(None)
    return found


def _hints(plan: Plan, gpu: Gpu | None, idle: str | None) -> Iterator[str]:
    if idle is not None:
        yield f"the GPU was not used: {idle}."
    if gpu is not None and gpu.fallbacks:
        yield f"GPU memory was short {gpu.fallbacks} times; those rows were quantized on the CPU."
    slow = _native.why_not() if plan.recipe.method and gpu is None else None
    if slow is not None:
        yield f"worked without compiled kernels: {slow}."


def _calibration_text(plan: Plan, opened: OpenedSource) -> CalibrationText | None:
    if plan.recipe.calibration is None:
        return None
    from .calibration import calibration_text

    return calibration_text(plan.recipe.calibration, opened.folder, plan.dims.context)


def _device_type(device: str) -> str:
    """Where a ``--device`` calibrates."""
    from ._device import find_gpu

    gpu, _ = find_gpu(device)
    return gpu.device.type if gpu else "cpu"


def _digest(
    plan: Plan,
    opened: OpenedSource,
    calibration: dict[str, Any] | None,
    calibrated_on: tuple[str, int] | None,
) -> str:
    """Identifies what would be written, so that nothing else is resumed."""
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in opened.source.files]
    return plan.digest(
        __version__,
        version("torch"),
        repr(state),
        *map(repr, opened.remote_files.items()),
        repr(calibration),
        repr(calibrated_on),
    )


def _whole_shards(output: OutputFolder, plan: Plan) -> dict[str, Any]:
    """Journal entries of the shards that are whole by their hash; others are dropped."""
    sizes = {shard.file: shard.nbytes for shard in plan.shards}
    for file, entry in list(output.finished.items()):
        path = output.partial / file
        known = file in sizes and isinstance(entry, dict) and {"sha256", "items"} <= entry.keys()
        if (
            not known
            or not path.exists()
            or path.stat().st_size != sizes[file]
            or sha256(path) != entry["sha256"]
        ):
            output.forget(file)
    return dict(output.finished)


def _check_places(opened: OpenedSource, out: Path) -> None:
    """Refuse an OUT that contains what is read, or lies in it: --force would delete it."""
    target = out.resolve()
    for what, folder in (("source", opened.folder), ("adapter", opened.adapter)):
        if folder is None:
            continue
        read = folder.resolve()
        if target.is_relative_to(read):
            raise OutputError(f"OUT {out} is inside the {what} {folder}; choose a folder elsewhere.")
        if read.is_relative_to(target):
            raise OutputError(f"the {what} {folder} is inside OUT {out}; choose another OUT.")


def _check_room(plan: Plan, finished: dict[str, Any], folder: Path, beside: int) -> None:
    needed = beside + sum(shard.nbytes for shard in plan.shards if shard.file not in finished)
    # Not counting on what half-written files take: they are gone by now.
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"the conversion needs {show_size(needed)} in {folder.parent}, where only {show_size(free)} "
            "are free; free some space or choose an OUT on another disk."
        )


def _index(plan: Plan) -> dict[str, Any]:
    def tensors(shard: ShardLayout) -> dict[str, str]:
        return {tensor.name: shard.file for tensor in shard.tensors}

    total = sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)
    weight_map = {name: file for shard in plan.shards for name, file in tensors(shard).items()}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
