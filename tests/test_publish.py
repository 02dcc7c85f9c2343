"""Publishing with the real clients to a hub on this machine: what arrives, what is refused, what is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_convert import content, flip_byte, run_cli, small_source, start_cli, wait_until
from hub import TOKEN, Fault, HubServer

import glmquant
from glmquant import HubError, Recipe, SourceError, UnsafeFileError, UsageError, VerificationError
from glmquant._card import folder_card
from glmquant.checkpoint.output import CARD, EVALUATION, REPORT
from glmquant.hub import modelscope_target

HUBS = ("hf", "ms")
SHARDS = 2
FIGURE = {"value": 1.0, "error": None}
NAME = "me/model-int4"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("publish")
    source = small_source(root / "source", hidden=512, layers=1)
    (source / "LICENSE").write_text("terms")
    glmquant.convert(source, root / "out", Recipe(method="rtn", max_shard_size=700_000))
    assert len(list((root / "out").glob("*.safetensors"))) == SHARDS
    return root / "out"


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture(params=HUBS)
def to(request: pytest.FixtureRequest, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place on one of the hubs, and a login that may write there."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    for module in ("_upload", "_legacy_api"):
        monkeypatch.setattr(f"modelscope_hub.{module}.time.sleep", lambda seconds: None)
    return f"{request.param}:{NAME}"


def held(server: HubServer, name: str = NAME) -> dict[str, bytes]:
    """What the hub has at the head of the default branch."""
    repository = server.repositories[name]
    files = repository.commits[repository.branches[repository.default]]
    return {name: bytes(file.data) for name, file in files.items()}


def test_a_published_folder_comes_back_identical(
    server: HubServer, to: str, out: Path, tmp_path: Path
) -> None:
    found = glmquant.publish(out, to)
    assert held(server).items() >= content(out).items()
    assert found.files.keys() == content(out).keys()
    assert found.commit == next(reversed(server.repositories[NAME].commits))
    assert NAME in str(found.page)
    assert found.card == (out / CARD).read_text()
    for place in (tmp_path / "again", None):
        folder = glmquant.download(to, local_dir=place).folder
        assert {name: (folder / name).read_bytes() for name in content(out)} == content(out)
        verified = glmquant.verify(folder)
        assert verified.ok
        assert verified.files == len(found.files) - 2  # all but the report itself and the card
    assert glmquant.verify(to).ok


def test_the_card_names_where_it_is(to: str, out: Path) -> None:
    card = glmquant.publish(out, to).card
    hub = to.partition(":")[0]
    assert card == folder_card(out, hub, NAME).decode()
    assert "quantized_by: me" in card
    assert f'from_pretrained("{NAME if hub == "hf" else "OUT"}")' in card
    assert ("modelscope download" in card) == (hub == "ms")


def test_a_gguf_file_comes_back_identical(server: HubServer, to: str, tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    glmquant.convert(small_source(tmp_path / "source"), out, Recipe(format="gguf", method="rtn"))
    glmquant.publish(out, to)
    folder = glmquant.download(to, local_dir=tmp_path / "again").folder
    assert {name: (folder / name).read_bytes() for name in content(out)} == content(out)
    assert glmquant.verify(folder).ok
    assert glmquant.verify(to).ok
    with pytest.raises(SourceError, match=r"a GGUF file.*glmquant download"):
        glmquant.inspect(to)


def test_a_second_time_nothing_is_sent(server: HubServer, to: str, out: Path) -> None:
    glmquant.publish(out, to)
    commits = len(server.repositories[NAME].commits)
    server.requests.clear()
    assert glmquant.publish(out, to).commit is None
    assert not server.uploaded()
    assert len(server.repositories[NAME].commits) == commits
    (out / EVALUATION).write_text(json.dumps({
        "text": "x", "predictions": 1, "window": 2, "dtype": "float32",
        **dict.fromkeys(("perplexity", "source_perplexity", "kl_mean", "top1_agreement"), FIGURE),
    }))  # fmt: skip
    glmquant.publish(out, to)  # figures that were measured since
    assert b"## Evaluation" in held(server)[CARD]
    assert EVALUATION in held(server)
    assert glmquant.download(to).folder.joinpath(EVALUATION).read_bytes() == (out / EVALUATION).read_bytes()
    (out / EVALUATION).write_text((out / EVALUATION).read_text().replace('"x"', '"y"'))
    glmquant.publish(out, to)  # and measured again
    assert b"with `glmquant eval`: y" in held(server)[CARD]
    assert not server.uploaded()


def test_dry_run_asks_and_writes_nothing(server: HubServer, to: str, out: Path) -> None:
    before = content(out)
    done = run_cli("publish", out, "--to", to, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["card"].startswith("---\n")
    assert shown["files"].keys() == before.keys()
    assert (shown["page"], shown["commit"]) == (None, None)
    done = run_cli("publish", out, "--to", to, "--dry-run")
    assert "## How to load" in done.stdout
    assert "model-00002-of-00002.safetensors" in done.stdout
    assert content(out) == before
    assert not server.requests


def test_the_command(server: HubServer, to: str, out: Path) -> None:
    done = run_cli("publish", out, "--to", to, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["commit"] in server.repositories[NAME].commits
    done = run_cli("publish", out, "--to", to)
    assert "it was all there" in done.stdout


def test_private(server: HubServer, to: str, out: Path) -> None:
    glmquant.publish(out, to, private=True)
    assert server.repositories[NAME].private
    assert "is private" in " ".join(glmquant.publish(out, to).notes)
    server.repositories[NAME].private = False
    with pytest.raises(HubError, match="everybody can see it"):
        glmquant.publish(out, to, private=True)


def test_no_licence_is_invented(server: HubServer, out: Path, to: str) -> None:
    """ModelScope's client says Apache-2.0 where it is told nothing."""
    glmquant.publish(out, to)
    made = [request for request in server.requests if request.path.endswith(("/v1/models", "/repos/create"))]
    assert made[0].status == 200
    assert b"apache" not in made[0].body.lower()
    assert all(request.status != 200 for request in made[1:])
    assert b"apache" not in held(server)[CARD].lower()


def test_damage_is_not_published(server: HubServer, to: str, out: Path) -> None:
    flip_byte(out / "model-00001-of-00002.safetensors")
    with pytest.raises(VerificationError, match=r"not published: model-00001.* has changed"):
        glmquant.publish(out, to)
    assert not server.requests


@pytest.mark.parametrize(
    "text", ["me/model", "hf:model", "hf:me/model@v1", "ms:", "file:me/x", "hf:../x", ""]
)
def test_places_that_are_none(out: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no place to publish"):
        glmquant.publish(out, text)


def test_only_what_convert_wrote(tmp_path: Path, out: Path, to: str, server: HubServer) -> None:
    with pytest.raises(UsageError, match="was not written by glmquant"):
        glmquant.publish(small_source(tmp_path / "raw"), to)
    (out / "secret.txt").write_text("mine")
    (out / CARD).write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    notes = " ".join(glmquant.publish(out, to).notes)
    assert "secret.txt: not published" in notes
    assert "edited" in notes
    assert "secret.txt" not in held(server)
    assert held(server)[CARD] == (out / CARD).read_bytes()


def test_a_card_that_is_replaced_is_told_of(server: HubServer, to: str, out: Path) -> None:
    held_before = server.add(NAME, default="main" if to.startswith("hf") else "master")
    held_before.commit({CARD: b"Written by hand."})
    done = run_cli("publish", out, "--to", to, "--dry-run")
    assert f"another {CARD} already, this one replaces it" in done.stdout
    found = glmquant.publish(out, to)
    assert f"the {CARD} that {found.page} held was replaced" in found.notes
    assert any("no base_model" in note for note in found.notes)
    assert not any("replaced" in note for note in glmquant.publish(out, to).notes)


def test_names_in_a_report_that_no_file_has(out: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads((out / REPORT).read_text())
    (out / "LICENSE\n").write_bytes((out / "LICENSE").read_bytes())
    report["files"]["LICENSE\n"] = report["files"]["LICENSE"]
    (out / REPORT).write_text(json.dumps(report))
    with pytest.raises(UnsafeFileError, match="nothing was published"):
        glmquant.publish(out, to)


def test_without_a_token(server: HubServer, to: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(HubError, match=r"needs a token: log in with"):
        glmquant.publish(out, to)
    assert not server.requests
    glmquant.publish(out, to, token=TOKEN)


@pytest.mark.parametrize("there", [False, True])
def test_without_the_right_to_write(server: HubServer, to: str, out: Path, there: bool) -> None:
    if there:
        server.add(NAME).commit({".gitattributes": b""})
    with pytest.raises(
        HubError, match=r"does not let this token write to me/model-int4 \(HTTP 403\).*log in"
    ):
        glmquant.publish(out, to, token="reads only")
    assert not server.uploaded()


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_other_content_is_not_overwritten(server: HubServer, to: str, out: Path, name: str) -> None:
    server.add(NAME, default="main" if to.startswith("hf") else "master").commit({name: b"other weights"})
    with pytest.raises(HubError, match=f"already holds {name}"):
        glmquant.publish(out, to)
    assert held(server)[name] == b"other weights"


def _cut(server: HubServer) -> None:
    server.faults.append(Fault("/lfs-upload/", cut=0.5, times=-1, method="PUT"))


def _down(server: HubServer) -> None:
    server.faults.append(Fault("/lfs-upload/", status=503, times=-1, method="PUT"))


def _busy(server: HubServer) -> None:
    server.faults.append(
        Fault("/commit/", status=429, headers={"Retry-After": "100000"}, times=-1, method="POST")
    )


@pytest.mark.parametrize("harm", [_cut, _down, _busy])
def test_an_interrupted_upload_is_taken_up_again(
    server: HubServer, to: str, out: Path, harm: Callable[[HubServer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # The first of the large files gets there, the second does not.
    first = json.loads((out / REPORT).read_text())["files"]["model-00001-of-00002.safetensors"]["sha256"]
    server.uploads[first] = (out / "model-00001-of-00002.safetensors").read_bytes()
    harm(server)
    with pytest.raises(HubError, match="run the same command again") as caught:
        glmquant.publish(out, to)
    assert "\n" not in str(caught.value)
    assert "config.json" not in held(server)  # nobody takes it for a model
    server.faults.clear()
    server.requests.clear()
    glmquant.publish(out, to)
    assert held(server).items() >= content(out).items()
    again = [request.path for request in server.uploaded()]
    assert len(again) <= 1
    assert not any(first in path for path in again)


def test_a_killed_upload_is_taken_up_again(server: HubServer, to: str, out: Path) -> None:
    server.rate = 600e3
    run = start_cli("publish", out, "--to", to)
    wait_until(lambda: len(server.uploads) > 0)
    run.kill()
    run.communicate()
    server.rate = None
    sent = set(server.uploads)
    server.requests.clear()
    done = run_cli("publish", out, "--to", to)
    assert done.returncode == 0, done.stderr
    assert not [r for r in server.uploaded() if any(digest in r.path for digest in sent)]
    assert held(server).items() >= content(out).items()


def test_a_hub_that_is_busy_is_asked_again(server: HubServer, to: str, out: Path) -> None:
    for where in ("/commit/", "/lfs-upload/"):
        method = "PUT" if "lfs" in where else "POST"
        server.faults.append(Fault(where, status=429, headers={"Retry-After": "1"}, method=method))
    glmquant.publish(out, to)
    assert [request.status for request in server.requests].count(429) == 2
    assert held(server).items() >= content(out).items()


@pytest.mark.parametrize("to", ["ms"], indirect=True)
def test_modelscope_is_down_when_all_has_arrived(
    server: HubServer, to: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing that says which commit it is."""
    usual = modelscope_target.ModelScopeTarget.files
    listed: list[object] = []

    def files(self: modelscope_target.ModelScopeTarget) -> Any:
        listed.append(usual(self))
        server.faults.append(Fault("/repo/files", status=403, times=-1))
        return listed[-1]

    monkeypatch.setattr(modelscope_target.ModelScopeTarget, "files", files)
    with pytest.raises(HubError, match="run the same command again"):
        glmquant.publish(out, to)
    assert "config.json" in held(server)
    assert len(listed) == 1


def test_what_arrived_is_compared(server: HubServer, to: str, out: Path) -> None:
    repository = server.add(NAME, default="main" if to.startswith("hf") else "master")
    repository.commit({".gitattributes": b""})
    shard = "model-00002-of-00002.safetensors"
    repository.listing[shard] = {"sha256": "0" * 64}
    with pytest.raises(HubError, match=f"holds another {shard} than was uploaded"):
        glmquant.publish(out, to)


def test_nobody_answers(out: Path, to: str) -> None:
    with pytest.raises(HubError, match=r"cannot be reached.*run the same command again"):
        glmquant.publish(out, to, endpoint="http://127.0.0.1:1")


def test_a_mirror(server: HubServer, out: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert str(glmquant.publish(out, to, endpoint=server.url).page).startswith(server.url)
