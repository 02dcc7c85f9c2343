"""Same input, same bytes: whatever the workers, the shards of the source and the time of day; and a true report."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_convert import config, content, small_source, stored_tensors, tensors, write_source
from safetensors.torch import load_file
from torch import Tensor

import glmquant
from glmquant import Recipe
from glmquant.checkpoint.output import CARD, REPORT

# Large enough for several tasks per tensor and several tensors per shard of the source.
SIZES = {"layers": 3, "hidden": 512, "ffn": 1280, "vocab": 1024}
TASK_BYTES = 1 << 17  # small tensors in several pieces, as large ones come
RECIPES = {
    "mse": Recipe(max_shard_size=2_000_000),
    "rtn": Recipe(method="rtn", group_size=32, quantize_head=True, quantize_embeddings=True),
    "asymmetric": Recipe(symmetric=False),
    "thudm": Recipe(format="cpm", bits=4),
    "16 bit": Recipe(bits=16),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model", **SIZES)


def converted(source: Path, out: Path, recipe: Recipe = RECIPES["mse"], **options: Any) -> dict[str, bytes]:
    glmquant.convert(source, out, recipe, **options)
    return content(out)


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / REPORT).read_text())
    return report


# The bytes


@pytest.mark.parametrize("name", RECIPES)
def test_workers_do_not_matter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("glmquant._quantize.TASK_BYTES", TASK_BYTES)
    one = converted(source, tmp_path / "1", RECIPES[name], workers=1)
    for workers in (2, 3, 5):
        assert converted(source, tmp_path / str(workers), RECIPES[name], workers=workers) == one


def test_tasks_are_cut_alike_for_every_number_of_workers(source: Path, tmp_path: Path) -> None:
    """Sums depend on how they are cut; the report's six digits must not."""
    steps: dict[int, list[tuple[int, str]]] = {}
    for workers in (1, 4):
        seen = steps.setdefault(workers, [])
        out = tmp_path / str(workers)
        glmquant.convert(
            source,
            out,
            workers=workers,
            progress=lambda done, total, name, seen=seen: seen.append((done, name)),
        )
    assert steps[1] == steps[4]


@pytest.mark.parametrize(("shards", "kind"), [(1, "bin"), (4, "bin"), (2, "safetensors"), (6, "safetensors")])
def test_files_of_the_source_do_not_matter(source: Path, tmp_path: Path, shards: int, kind: str) -> None:
    usual = converted(source, tmp_path / "usual")
    other = small_source(tmp_path / "other", shards=shards, kind=kind, **SIZES)
    found = converted(other, tmp_path / "out")
    reports = [json.loads(files.pop(REPORT)) for files in (usual, found)]
    cards = [_without_source_files(files.pop(CARD)) for files in (usual, found)]
    assert found == usual
    assert cards[0] == cards[1]
    sources = [report.pop("source").pop("files") for report in reports]
    assert reports[0] == reports[1]
    assert len(sources[1]) == shards
    assert not {f["sha256"] for f in sources[0].values()} & {f["sha256"] for f in sources[1].values()}


def _without_source_files(card: bytes) -> list[str]:
    """The lines of a card but those with the hashes of what was read, and its seal."""
    return [line for line in card.decode().splitlines() if not line.startswith(("| read: ", "<!-- "))]


def test_time_and_place_do_not_matter(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = converted(source, tmp_path / "first")
    moved = tmp_path / "a copy elsewhere" / "renamed"
    shutil.copytree(source, moved)
    for path in moved.iterdir():
        os.utime(path, (86_400, 86_400))
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.chdir(moved)
    assert converted(Path(), Path("../out")) == first


@pytest.mark.parametrize("name", RECIPES)
def test_no_dates_and_no_paths(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    glmquant.convert(source, out, RECIPES[name])
    today = datetime.date.today()
    for path in out.iterdir():
        text = path.read_bytes() if path.suffix != ".safetensors" else header(path)
        assert not re.search(rb"\b%d-\d\d-\d\d" % today.year, text), path.name
        assert not re.search(rb"\b%d\d{5}" % (time.time() // 100_000), text), path.name
        for place in (tmp_path, source, Path.cwd(), Path.home(), Path(glmquant.__file__).parent):
            assert str(place).encode() + b"/" not in text + b"/", f"{place} in {path.name}"
        assert b".partial" not in text


def header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_runs_differ_where_they_should(source: Path, tmp_path: Path) -> None:
    usual = converted(source, tmp_path / "usual")
    other = small_source(tmp_path / "other", seed=1, **SIZES)
    assert converted(other, tmp_path / "out")["config.json"] == usual["config.json"]
    assert not set(weights(content(tmp_path / "out"))) & set(weights(usual))


def weights(files: dict[str, bytes]) -> list[bytes]:
    return [data for name, data in files.items() if name.endswith(".safetensors")]


# The report


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmquant._quantize.TASK_BYTES", TASK_BYTES)
        glmquant.convert(source, out, RECIPES["mse"])
    return out


def test_report_hashes(source: Path, out: Path) -> None:
    report, files = report_of(out), content(out)
    del files[REPORT], files[CARD]
    assert report["files"] == {name: stated(data) for name, data in files.items()}
    of_source = {"model.safetensors": stated((source / "model.safetensors").read_bytes())}
    assert report["source"] == {"stored_as": "safetensors", "adapter": False, "files": of_source}


def stated(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_report_says_what_was_done_with_what(out: Path) -> None:
    report = report_of(out)
    assert report["glmquant"] == glmquant.__version__
    assert report["versions"] == {"torch": version("torch"), "safetensors": version("safetensors")}
    assert report["family"] == "chatglm2"
    # Every choice is filled in: with this recipe the same bytes can be made again.
    assert None not in report["recipe"].values()
    assert report["recipe"]["method"] == "mse"
    assert report["recipe"]["group_size"] == 128


def test_report_recipe_makes_the_same_bytes(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmquant._quantize.TASK_BYTES", TASK_BYTES)
    assert converted(source, tmp_path / "again", Recipe(**report_of(out)["recipe"])) == content(out)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes in int32 words of compressed-tensors, lowest bits first, stored with an offset."""
    shifts = torch.arange(0, 32, bits)
    fields = (packed.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(1) - (1 << (bits - 1))


NATIVE = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def exact_weights(source: Path) -> dict[str, Tensor]:
    """The linear weights of the source by native names, float64."""
    found = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." not in name or weight.dim() < 2:
            continue
        name = name.replace("transformer.encoder", "model").removesuffix(".weight")
        if name.endswith("query_key_value"):
            rows = [SIZES["hidden"], 64, 64]
            for part, piece in zip("qkv", weight.double().split(rows), strict=True):
                found[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = piece
            continue
        for old, new in NATIVE.items():
            name = name.replace(old, new)
        found[name] = weight.double()
    return found


def test_report_errors(source: Path, out: Path) -> None:
    report, stored, exact = report_of(out), stored_tensors(out), exact_weights(source)
    assert len(exact) == SIZES["layers"] * 6
    entries = {n.removesuffix(".weight"): e for n, e in report["tensors"].items() if e["scheme"]}
    assert set(entries) == set(exact)
    for name, weight in exact.items():
        codes = unpacked(stored[name + ".weight_packed"], 4).double()
        scale = stored[name + ".weight_scale"].double().repeat_interleave(128, dim=1)
        error = float((codes * scale - weight).norm() / weight.norm())
        assert entries[name]["relative_error"] == pytest.approx(error, rel=2e-6)
        assert entries[name]["scheme"] == "int4 g128"
        assert len(f"{entries[name]['relative_error']:.15g}") <= len("0.0123456")  # the rest is the machine's
    errors = {name + ".weight": entry["relative_error"] for name, entry in entries.items()}
    summary = report["summary"]
    assert summary["worst_relative_error"] == max(errors.values()) == errors[summary["worst_tensor"]]
    assert summary["mean_relative_error"] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-5)
    assert 0.05 < summary["mean_relative_error"] < 0.12  # of INT4 on Gaussian weights


def test_report_bytes(source: Path, out: Path) -> None:
    report, stored = report_of(out), stored_tensors(out)
    assert sum(entry["bytes"] for entry in report["tensors"].values()) == sum(
        tensor.numel() * tensor.element_size() for tensor in stored.values()
    )
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    originals = load_file(source / "model.safetensors").values()
    assert report["summary"]["bytes"] == sum(files)
    assert report["summary"]["source_bytes"] == sum(2 * tensor.numel() for tensor in originals)
    parameters = sum(tensor.numel() for tensor in originals)
    assert report["summary"]["bits_per_weight"] == pytest.approx(8 * sum(files) / parameters, rel=1e-3)


def test_index(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    by_file = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(by_file) > 2
    assert index["weight_map"] == {name: file for file, held in by_file.items() for name in held}
    total = sum(t.numel() * t.element_size() for held in by_file.values() for t in held.values())
    assert index["metadata"] == {"total_size": total}


def test_float32_sources(tmp_path: Path) -> None:
    """Fine-tunes are stored wider than they are run; the report counts what was read."""
    made = config()
    wide = {name: tensor.float() for name, tensor in tensors(made).items()}
    write_source(tmp_path / "wide", wide, made)
    small_source(tmp_path / "narrow")
    reports = []
    for name in ("wide", "narrow"):
        glmquant.convert(tmp_path / name, tmp_path / (name + "-out"))
        reports.append(report_of(tmp_path / (name + "-out")))
    assert reports[0]["files"] == reports[1]["files"]
    assert reports[0]["summary"]["source_bytes"] == 2 * reports[1]["summary"]["source_bytes"]
    assert reports[0]["tensors"] == reports[1]["tensors"]
