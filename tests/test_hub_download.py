"""Downloading with the real clients from a hub on this machine: what comes, what is checked, what is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_convert import content, run_cli, small_source
from hub import TOKEN, Fault, HubServer

import glmquant
from glmquant import HubError, OutputError, SourceError, UnsafeFileError, UsageError
from glmquant.hub import local_folder, resolve

HUBS = ("hf", "ms")
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = small_source(tmp_path / "source", shards=3)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(params=HUBS)
def ref(request: pytest.FixtureRequest, server: HubServer, source: Path) -> str:
    """A model on both hubs, with files that nobody needs."""
    repository = server.add("org/model")
    repository.commit_folder(source)
    repository.commit(
        {"modeling.py": b"raise SystemExit", "onnx/model.onnx": b"0" * 100, "pytorch_model.bin": b"old"}
    )
    return f"{request.param}:org/model"


def test_only_what_is_needed_comes(server: HubServer, ref: str, source: Path) -> None:
    found = glmquant.download(ref)
    assert {name: (found.folder / name).read_bytes() for name in found.files} == content(source)
    assert found.commit == server.repositories["org/model"].branches["main"]
    assert found.files[SHARD] == hashlib.sha256((source / SHARD).read_bytes()).hexdigest()
    asked = " ".join(f"{r.path} {r.query}" for r in server.requests)
    assert not any(name in asked for name in ("modeling.py", "onnx", "pytorch_model"))


def test_a_second_time_nothing_comes(server: HubServer, ref: str) -> None:
    glmquant.download(ref)
    server.requests.clear()
    glmquant.download(ref)
    assert server.file_bytes("safetensors") == 0


def test_a_folder_of_ones_own(ref: str, source: Path, tmp_path: Path) -> None:
    found = glmquant.download(ref, local_dir=tmp_path / "mine", exclude=["LICENSE"])
    assert found.folder == tmp_path / "mine"
    expected = content(source)
    del expected["LICENSE"]
    assert {n: d for n, d in content(found.folder).items() if not n.startswith(".")} == expected
    assert glmquant.inspect(found.folder).nbytes == glmquant.inspect(source).nbytes


def test_patterns(ref: str, tmp_path: Path) -> None:
    found = glmquant.download(
        ref, include=["*.json", "onnx/*"], exclude=["config*"], local_dir=tmp_path / "mine"
    )
    assert sorted(found.files) == ["model.safetensors.index.json", "onnx/model.onnx"]
    with pytest.raises(SourceError, match="no file that is asked for"):
        glmquant.download(ref, include=["*.gguf"])


@pytest.mark.parametrize("hub", HUBS)
def test_patterns_in_a_repository_without_a_model(hub: str, server: HubServer) -> None:
    server.add("org/files").commit({"a.gguf": b"weights", "b.txt": b"words"})
    found = glmquant.download(f"{hub}:org/files", include=["*.gguf"])
    assert list(found.files) == ["a.gguf"]
    assert (found.folder / "a.gguf").read_bytes() == b"weights"


def test_a_cache_that_has_become_old_is_not_used(server: HubServer, ref: str) -> None:
    """Files of the same size that have changed on the hub since, among those that are read without a download."""
    config = (glmquant.download(ref).folder / "config.json").read_bytes()
    changed = config.replace(b"1e-05", b"1e-06")
    assert len(changed) == len(config)
    assert changed != config
    weights = server.repositories["org/model"].commits[server.repositories["org/model"].branches["main"]]
    shard = bytes(weights[SHARD].data)[:-1] + b"\x01"
    assert shard != weights[SHARD].data
    server.repositories["org/model"].commit({"config.json": changed, SHARD: shard})
    assert (local_folder(ref) / SHARD).read_bytes() == shard
    assert (local_folder(ref) / "config.json").read_bytes() == changed


@pytest.mark.parametrize("name", ["LICENSE", "config.json", SHARD])
def test_files_of_ones_own_are_not_replaced(name: str, server: HubServer, ref: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{name} is there already.*--exclude {name}"):
        glmquant.download(ref, local_dir=mine)
    assert content(mine) == {name: b"mine"}
    glmquant.download(ref, local_dir=mine, exclude=[name])
    assert (mine / name).read_text() == "mine"
    glmquant.download(ref, local_dir=mine, exclude=[name])  # what came before is not in the way


@pytest.mark.parametrize("hub", HUBS)
def test_a_cut_connection_is_resumed(hub: str, server: HubServer, source: Path) -> None:
    data = {**content(source), SHARD: (source / SHARD).read_bytes()}
    server.add("org/model").commit(data)
    server.faults.append(Fault(SHARD, cut=0.5))
    found = glmquant.download(f"{hub}:org/model")
    assert (found.folder / SHARD).read_bytes() == data[SHARD]
    assert server.file_bytes(SHARD) < 1.1 * len(data[SHARD])  # the second half only


def test_a_wrong_byte_is_noticed_and_fetched_again(server: HubServer, ref: str, source: Path) -> None:
    server.faults.append(Fault(SHARD, flip=100_000))
    found = glmquant.download(ref)
    assert (found.folder / SHARD).read_bytes() == (source / SHARD).read_bytes()
    assert server.file_bytes(SHARD) == 2 * (source / SHARD).stat().st_size


def test_bytes_that_stay_wrong_are_an_error(server: HubServer, ref: str) -> None:
    server.faults.append(Fault(SHARD, flip=100_000, times=-1))
    with pytest.raises(HubError, match=r"another content.*removed"):
        glmquant.download(ref)
    server.faults.clear()
    server.requests.clear()
    glmquant.download(ref)
    assert server.file_bytes(SHARD) > 0


def test_a_small_file_in_git_is_checked_too(server: HubServer, ref: str, source: Path) -> None:
    server.faults.append(Fault("config.json", flip=3))
    assert (glmquant.download(ref).folder / "config.json").read_bytes() == (
        source / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("where", ["/api/", SHARD])
def test_a_hub_that_is_busy_is_asked_again(where: str, server: HubServer, ref: str) -> None:
    server.faults.append(Fault(where, status=429, headers={"Retry-After": "1"}))
    glmquant.download(ref)
    assert [r.status for r in server.requests].count(429) == 1


def test_a_revision_is_pinned_to_its_commit(server: HubServer, tmp_path: Path) -> None:
    repository = server.add("org/model")
    old = repository.commit_folder(small_source(tmp_path / "old", seed=1))
    repository.branches["v1"] = old
    repository.commit_folder(small_source(tmp_path / "new", seed=2))
    for revision in ("v1", old):
        found = glmquant.download(f"org/model@{revision}")
        assert found.commit == old
        assert (found.folder / "model.safetensors").read_bytes() == content(tmp_path / "old")[
            "model.safetensors"
        ]


def _gated(server: HubServer) -> None:
    server.repositories["org/model"].gated = True


def _private(server: HubServer) -> None:
    server.repositories["org/model"].private = True


def _gone(server: HubServer) -> None:
    del server.repositories["org/model"]


def _broken(server: HubServer) -> None:
    server.faults.append(Fault("/", status=500, times=-1))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_gated, ("ask for access at", "log in")),
        (_private, ("private", "log in")),
        (_gone, ("has no model org/model", "check the name")),
        (_broken, ("500", "run the same command again")),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    harm: Callable[[HubServer], None],
    words: tuple[str, ...],
    server: HubServer,
    ref: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    harm(server)
    with pytest.raises(HubError) as caught:
        glmquant.download(ref)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_opens_what_is_private(server: HubServer, ref: str) -> None:
    _private(server)
    assert glmquant.download(ref, token=TOKEN).commit


def test_a_revision_that_is_not_there(ref: str) -> None:
    with pytest.raises(HubError, match="no revision v9"):
        glmquant.download(f"{ref}@v9")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("hf:THUDM/chatglm3-6b", "ms:ZhipuAI/chatglm3-6b"),
        ("ms:ZhipuAI/glm-4-9b-chat", "hf:zai-org/glm-4-9b-chat"),
    ],
)
def test_other_names_of_a_known_model_are_suggested(name: str, other: str, server: HubServer) -> None:
    with pytest.raises(HubError, match=other):
        glmquant.download(name)


def test_a_name_that_may_be_a_misspelled_folder(server: HubServer) -> None:
    with pytest.raises(
        HubError, match=r"^out/int4 is not a folder on this machine, and http.* has no model out/int4"
    ):
        glmquant.inspect("out/int4")


@pytest.mark.parametrize("hub", HUBS)
def test_nobody_answers(hub: str) -> None:
    with pytest.raises(HubError, match=r"cannot be reached.*--endpoint"):
        glmquant.download(f"{hub}:org/model", endpoint="http://127.0.0.1:1")


def test_what_is_not_fetched_is_not_said_to_be_kept(server: HubServer, source: Path) -> None:
    server.add("org/model").commit_folder(source)
    server.faults += [Fault(SHARD, status=400, times=100)]
    for use, kept in ((glmquant.inspect, False), (glmquant.download, True)):
        with pytest.raises(HubError, match="run the same command again") as caught:
            use("hf:org/model")
        assert ("what has been fetched is kept" in str(caught.value)) == kept


def test_without_room_nothing_is_fetched(server: HubServer, ref: str) -> None:
    server.repositories["org/model"].listing[SHARD] = {"size": 1 << 49}
    with pytest.raises(OutputError, match=r"needs 524288.* GiB.*free"):
        glmquant.download(ref)
    assert server.file_bytes("00001-of") == 0


def test_what_has_come_already_needs_no_room(
    ref: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    whole = (source / SHARD).read_bytes()
    (mine / f"{SHARD}.incomplete").write_bytes(whole[: len(whole) - 5000])
    needed = sum(p.stat().st_size for p in source.iterdir()) - len(whole) + 5000
    free = type("Usage", (), {"free": needed + 10_000})
    monkeypatch.setattr("glmquant.hub.fetching.shutil.disk_usage", lambda place: free)
    glmquant.download(ref, local_dir=mine)
    assert (mine / SHARD).read_bytes() == whole


def test_offline(server: HubServer, ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = glmquant.download(ref).folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert glmquant.download(ref).folder == local_folder(ref) == folder
    (folder / SHARD).unlink()
    with pytest.raises(SourceError, match=f"shard '{SHARD}' is missing"):
        glmquant.inspect(ref)
    with pytest.raises(HubError, match=r"glmquant download \w+:org/other"):
        local_folder(ref.replace("model", "other"))
    assert not server.requests


# What is asked for.


def test_a_folder_wins_over_a_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("THUDM/chatglm3-6b").hub == "hf"
    (tmp_path / "THUDM" / "chatglm3-6b").mkdir(parents=True)
    ref = resolve("THUDM/chatglm3-6b")
    assert ref.folder == Path("THUDM/chatglm3-6b")
    assert ref.note is not None
    assert "hf:THUDM/chatglm3-6b" in ref.note
    assert resolve("hf:THUDM/chatglm3-6b").folder is None
    with pytest.raises(UsageError, match="hf:THUDM"):
        glmquant.download("THUDM/chatglm3-6b")


@pytest.mark.parametrize(
    "text", ["hf:", "hf:model", "hf:a/b/c", "ms:../x", "hf:a/b@", "hf:a/..", "hf:a/b@../c", "ms:a b/c"]
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(SourceError, match="not the name of a model"):
        resolve(text)


def test_revisions_with_a_slash() -> None:
    ref = resolve("ms:org/name.v2@refs/pr/1")
    assert (ref.hub, ref.name, ref.revision, str(ref)) == (
        "ms",
        "org/name.v2",
        "refs/pr/1",
        "ms:org/name.v2@refs/pr/1",
    )


# Hostile repositories.

HOSTILE_NAMES = (
    "LICENSE/../../../evil",
    "LICENSE\n",
    "LICENSE\x1b[2J",
    "LICENSE\\..\\evil",
    "LICENSE" + 300 * "x",
)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize("hub", HUBS)
def test_hostile_file_names(hub: str, name: str, server: HubServer, source: Path, tmp_path: Path) -> None:
    server.add("org/model").commit({**content(source), name: b"evil"})
    before = set(tmp_path.rglob("*evil*"))
    with pytest.raises(UnsafeFileError, match="nothing of it was downloaded"):
        glmquant.download(f"{hub}:org/model", include=["LICENSE*"], local_dir=tmp_path / "mine")
    assert set(tmp_path.rglob("*evil*")) == before
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/tmp/evil.safetensors", "a\\b.safetensors"])
def test_an_index_that_points_outside(shard: str, server: HubServer, ref: str) -> None:
    index = {"weight_map": {"x": shard}}
    repository = server.repositories["org/model"]
    repository.commit({"model.safetensors.index.json": json.dumps(index).encode(), shard: b"evil"})
    with pytest.raises(UnsafeFileError, match="outside"):
        glmquant.download(ref)
    assert server.file_bytes("evil") == 0


@pytest.mark.parametrize(
    "shard", ["a\nb.safetensors", "\x1b[2Jx.safetensors", "x\u202e.safetensors"], ids=repr
)
def test_an_index_with_control_characters(shard: str, server: HubServer, ref: str, tmp_path: Path) -> None:
    index = {"weight_map": {"x": shard}}
    repository = server.repositories["org/model"]
    repository.commit({"model.safetensors.index.json": json.dumps(index).encode(), shard: b"evil"})
    for use in (glmquant.download, glmquant.inspect, lambda ref: glmquant.convert(ref, tmp_path / "out")):
        with pytest.raises(UnsafeFileError, match="lists a file called"):
            use(ref)
    assert server.file_bytes("safetensors") == server.file_bytes("index.json")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(shard)]


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE-x"])
def test_absurd_files_beside_the_weights(name: str, server: HubServer, ref: str, tmp_path: Path) -> None:
    server.repositories["org/model"].commit({name: b"1"})
    server.repositories["org/model"].listing[name] = {"size": 300 << 30}
    for use in (glmquant.download, lambda ref: glmquant.convert(ref, tmp_path / "out")):
        with pytest.raises(SourceError, match=f"{name} of {ref} has 300.00 GiB"):
            use(ref)
    assert not server.file_bytes(name)


@pytest.mark.parametrize("size", [-1, 1 << 60, "many"], ids=repr)
def test_absurd_sizes(size: Any, server: HubServer, ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.repositories.Repository.size_of", lambda self, name, file: size)
    with pytest.raises(HubError, match="with a size of"):
        glmquant.download(ref)


@pytest.mark.parametrize("hub", HUBS)
def test_a_link_is_not_written_through(hub: str, server: HubServer, source: Path, tmp_path: Path) -> None:
    """Neither to what a folder of ones own holds, nor to what an interrupted download left there."""
    server.add("org/model").commit_folder(source)
    (tmp_path / "mine").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    for name in (SHARD, "LICENSE", f"{SHARD}.incomplete"):
        (tmp_path / "mine" / name).symlink_to(outside)
    folder = glmquant.download(f"{hub}:org/model", local_dir=tmp_path / "mine").folder
    assert (folder / SHARD).read_bytes() == (source / SHARD).read_bytes()
    assert (folder / "LICENSE").read_text() == "free"
    assert outside.read_text() == "untouched"


@pytest.mark.parametrize("command", [("inspect",), ("recipes", "--context", "128"), ("convert", "--dry-run")])
@pytest.mark.parametrize("hub", HUBS)
def test_a_mirror_for_every_command_that_reads(
    command: tuple[str, ...],
    hub: str,
    server: HubServer,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add("org/model").commit_folder(source)
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    out = [tmp_path / "out"] if command[0] == "convert" else []
    done = run_cli(command[0], f"{hub}:org/model", *out, *command[1:], "--endpoint", server.url)
    assert done.returncode == 0, done.stderr
    assert server.requests


def test_the_command(server: HubServer, ref: str, tmp_path: Path) -> None:
    done = run_cli("download", ref, "--local-dir", tmp_path / "mine", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["commit"] == server.repositories["org/model"].branches["main"]
    assert (tmp_path / "mine" / SHARD).exists()
    done = run_cli("download", ref, "--revision", "v9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no revision v9" in done.stderr
    assert done.stderr.count("\n") == 1
