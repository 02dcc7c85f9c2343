"""Converting while downloading, and reading headers by ranges, with the real clients and a hub on this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from helpers_convert import (
    SMALL_SHARDS,
    content,
    partial_of,
    run_cli,
    small_source,
    start_cli,
    stored_tensors,
    wait_until,
)
from hub import Fault, HubServer

import glmquant
from glmquant import HubError, Recipe, SourceError, UnsafeFileError
from glmquant.checkpoint.output import CARD, REPORT
from glmquant.hub import open_repository
from glmquant.hub.refs import resolve
from glmquant.memory import Workload

HUBS = ("hf", "ms")
# Large enough for headers to be a small part of them.
SIZES = {"layers": 4, "hidden": 512, "ffn": 1024, "vocab": 1024}
RTN = Recipe(method="rtn")


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "source"
    return small_source(folder, shards=5, kind=request.param, **SIZES)


@pytest.fixture(params=HUBS)
def ref(request: pytest.FixtureRequest, server: HubServer, source: Path) -> str:
    server.add("org/model").commit_folder(source)
    return f"{request.param}:org/model"


def _shards(source: Path) -> list[Path]:
    return sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".bin"))


def test_inspect_reads_headers_only(server: HubServer, ref: str, source: Path) -> None:
    found, local = glmquant.inspect(ref).to_json(), glmquant.inspect(source).to_json()
    del found["folder"], local["folder"]
    assert found == local
    assert server.file_bytes("model-0") <= 5 * (140 << 10)
    assert sum(p.stat().st_size for p in _shards(source)) > 12 << 20


@pytest.mark.parametrize("hub", HUBS)
def test_a_mirror_that_gives_whole_files_is_not_read_to_the_end(server: HubServer, hub: str) -> None:
    server.ranges = False
    data = os.urandom(1 << 20) * 64
    server.add("org/model").commit({"model.safetensors": data, "config.json": b"{}"})
    repository = open_repository(resolve(f"{hub}:org/model"))
    for start in (0, 3_000_001):
        stop = start + 200_000
        assert repository.read("model.safetensors", start, stop) == data[start:stop]
    assert server.file_bytes() < len(data) / 2


def test_recipes_read_headers_only(server: HubServer, ref: str, source: Path) -> None:
    load = Workload(context=128)
    assert glmquant.recipes(ref, load) == glmquant.recipes(source, load)
    assert server.file_bytes("model-0") <= 5 * (140 << 10)


def test_measurements_of_different_models_are_kept_apart(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMQUANT_CACHE", str(tmp_path / "cache"))
    for seed in (1, 2):
        server.add(f"org/model{seed}").commit_folder(small_source(tmp_path / str(seed), seed=seed))
    first, second = (glmquant.measure(f"hf:org/model{seed}", "rtn") for seed in (1, 2))
    assert first != second
    assert second == glmquant.measure(tmp_path / "2", "rtn")


def test_the_same_bytes_as_from_a_folder(server: HubServer, ref: str, source: Path, tmp_path: Path) -> None:
    result = glmquant.convert(ref, tmp_path / "out", RTN)
    glmquant.convert(source, tmp_path / "local", RTN)
    streamed, local = content(tmp_path / "out"), content(tmp_path / "local")
    reports = json.loads(streamed.pop(REPORT)), json.loads(local.pop(REPORT))
    assert f"glmquant convert {ref}@" in streamed.pop(CARD).decode()
    assert "glmquant convert SOURCE OUT" in local.pop(CARD).decode()
    assert streamed == local
    assert reports[0]["source"].pop("repository") == ref
    assert reports[0]["source"].pop("commit") == server.repositories["org/model"].branches["main"]
    assert reports[0] == reports[1]
    assert glmquant.verify(result.out).ok
    # Nothing of the weights is left, not even in a cache.
    names = {p.name for p in _shards(source)}
    assert not [p for p in tmp_path.rglob("*") if p.name in names]
    for path in _shards(source):  # and each came once, next to its header
        assert server.file_bytes(path.name) < path.stat().st_size + (300 << 10)


def test_at_most_two_shards_are_on_the_disk(
    server: HubServer, ref: str, source: Path, tmp_path: Path
) -> None:
    server.rate = 20e6
    most = 0
    names = {p.name for p in _shards(source)}

    def look(done: int, total: int, name: str) -> None:
        nonlocal most
        kept = [p for p in partial_of(tmp_path / "out").rglob("*") if any(n in p.name for n in names)]
        most = max(
            most,
            len(
                {
                    n
                    for n in names
                    for p in kept
                    if n in p.name and ".lock" not in p.name and ".metadata" not in p.name
                }
            ),
        )

    glmquant.convert(ref, tmp_path / "out", RTN, workers=1, progress=look)
    assert 1 <= most <= 2


def test_keep_source(ref: str, source: Path, tmp_path: Path) -> None:
    glmquant.convert(ref, tmp_path / "out", RTN, keep_source=True)
    kept = {p.name for p in tmp_path.rglob("*") if (tmp_path / "out") not in p.parents}
    assert {p.name for p in _shards(source)} <= kept


def test_what_the_cache_holds_is_used(server: HubServer, ref: str, source: Path, tmp_path: Path) -> None:
    folder = glmquant.download(ref).folder
    server.requests.clear()
    glmquant.convert(ref, tmp_path / "out", RTN)
    assert server.file_bytes("model-0") <= 5 * (140 << 10)  # headers
    assert all((folder / p.name).exists() for p in _shards(source))


def test_a_killed_run_is_resumed_without_fetching_twice(
    server: HubServer,
    ref: str,
    source: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    server.rate = 4e6
    options = ("--method", "rtn", "--max-shard-size", "1MB", "--workers", "1")
    run = start_cli("convert", ref, out, *options)
    third = _shards(source)[2]
    wait_until(lambda: server.file_bytes(third.name) > 150 << 10)
    wait_until(lambda: len(list(partial_of(out).glob("*.safetensors"))) > 1)
    run.kill()
    run.communicate()
    before = {path.name: server.file_bytes(path.name) for path in _shards(source)}
    server.rate = None
    server.requests.clear()
    done = run_cli("convert", ref, out, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert server.file_bytes(_shards(source)[0].name) < 140 << 10  # its header
    assert before[_shards(source)[0].name] > _shards(source)[0].stat().st_size
    reference = tmp_path / "local"
    glmquant.convert(source, reference, Recipe(method="rtn", max_shard_size=1_000_000))
    assert _equal(stored_tensors(out), stored_tensors(reference))


def _interrupted(ref: str, out: Path, recipe: Recipe, part: float) -> None:
    """Convert, going on from where the last attempt ended, until `part` of the source has been read."""

    def stop(done: int, total: int, name: str) -> None:
        if done >= part * total:
            raise HubError("the line was cut.")

    with pytest.raises(HubError, match="cut"):
        glmquant.convert(ref, out, recipe, resume=True, progress=stop)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(method="rtn", max_shard_size=300_000)], ids=["one shard", "many"]
)
def test_what_was_quantized_is_not_fetched_again(
    server: HubServer, ref: str, source: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """Shards of the source are deleted when they are done with, in the middle of a shard of the result too."""
    out, undisturbed, shards = tmp_path / "out", tmp_path / "undisturbed", _shards(source)
    glmquant.convert(source, undisturbed, recipe)
    for part in (0.3, 0.5, 0.9):
        _interrupted(ref, out, recipe, part)
    fetched = partial_of(out) / ".glmquant-source"
    assert not (fetched / shards[0].name).exists()
    server.requests.clear()
    glmquant.convert(ref, out, recipe, resume=True)
    for shard in shards[:3]:
        assert server.file_bytes(shard.name) < 140 << 10  # its header
    assert glmquant.verify(out).ok
    results = [{p.name: p.read_bytes() for p in f.glob("*.safetensors")} for f in (out, undisturbed)]
    assert results[0] == results[1]
    reports = [json.loads((f / REPORT).read_text())["tensors"] for f in (out, undisturbed)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_beginning_that_is_not_as_it_was_is_made_again(
    server: HubServer, source: Path, tmp_path: Path, harm: str
) -> None:
    server.add("org/model").commit_folder(source)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    _interrupted("hf:org/model", out, Recipe(), 0.9)
    begun = json.loads((partial_of(out) / ".glmquant-journal.json").read_text())["begun"]
    file = partial_of(out) / begun["file"]
    data = bytearray(file.read_bytes())
    data[begun["bytes"] // 2] ^= 1
    file.write_bytes(data if harm == "changed" else data[: begun["bytes"] // 2])
    if harm == "gone":
        file.unlink()
    glmquant.convert("hf:org/model", out, Recipe(), resume=True)
    glmquant.convert(source, undisturbed, Recipe())
    assert (out / file.name).read_bytes() == (undisturbed / file.name).read_bytes()


class _PowerCut(BaseException):
    """No client takes it for a failure that is worth another try."""


def test_a_shard_is_resumed_in_its_middle(server: HubServer, ref: str, source: Path, tmp_path: Path) -> None:
    first = _shards(source)[0]

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith(f"fetching {first.name}") and int(name.split()[-2]) >= 60:
            raise _PowerCut

    with pytest.raises(_PowerCut):
        glmquant.convert(ref, tmp_path / "out", RTN, progress=stop)
    server.requests.clear()
    glmquant.convert(ref, tmp_path / "out", RTN, resume=True)
    assert server.file_bytes(first.name) < 0.45 * first.stat().st_size + (
        140 << 10
    )  # what was left, and headers
    assert glmquant.verify(tmp_path / "out").ok


def test_ctrl_c_does_not_wait_for_the_shard(
    server: HubServer, ref: str, source: Path, tmp_path: Path
) -> None:
    server.rate = 300e3  # a shard would take ten seconds
    run = start_cli("convert", ref, tmp_path / "out")
    wait_until(lambda: server.file_bytes("-00001-of") > 400 << 10)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "--resume" in err
    assert server.file_bytes("-00001-of") < _shards(source)[0].stat().st_size
    assert not (tmp_path / "out").exists()


def test_a_network_that_goes_away(
    server: HubServer, ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glmquant.inspect(ref)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("modelscope_hub._download_control._DownloadControl.sleep", lambda self, seconds: None)
    broken = []

    def break_it(done: int, total: int, name: str) -> None:
        if done and not broken:
            broken.append(True)
            server.faults.append(Fault("model-0", status=503, times=-1))

    with pytest.raises(HubError, match="run the same command with --resume") as caught:
        glmquant.convert(ref, tmp_path / "out", SMALL_SHARDS, progress=break_it)
    assert "is kept" not in str(caught.value)  # only with --resume
    assert not (tmp_path / "out").exists()
    server.faults.clear()
    glmquant.convert(ref, tmp_path / "out", SMALL_SHARDS, resume=True)
    assert glmquant.verify(tmp_path / "out").ok


def test_a_pickle_that_runs_code_is_refused_before_it_is_downloaded(
    server: HubServer,
    tmp_path: Path,
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    folder = small_source(tmp_path / "source", kind="bin")
    torch.save(
        {"x": torch.zeros(1 << 20), "evil": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle
    )
    server.add("org/model").commit_folder(folder)
    for hub in HUBS:
        with pytest.raises(
            UnsafeFileError, match=rf"{hub}:org/model/pytorch_model.bin holds more than weights"
        ):
            glmquant.convert(f"{hub}:org/model", tmp_path / "out")
    assert server.file_bytes("pytorch_model.bin") < 1 << 20
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("harm", ["header", "pointer"])
@pytest.mark.parametrize("hub", HUBS)
def test_damaged_weights(hub: str, harm: str, server: HubServer, tmp_path: Path) -> None:
    folder = small_source(tmp_path / "source")
    path = folder / "model.safetensors"
    if harm == "header":
        path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234567\n")
    server.add("org/model").commit_folder(folder)
    with pytest.raises(SourceError, match=f"{hub}:org/model/model.safetensors"):
        glmquant.inspect(f"{hub}:org/model")


def test_loading_a_model_by_its_name(server: HubServer, ref: str, source: Path) -> None:
    model = glmquant.load(ref, device="cpu")
    expected = glmquant.load(source, device="cpu").state_dict()
    assert _equal(model.state_dict(), expected)


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
