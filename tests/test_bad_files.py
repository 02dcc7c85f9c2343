"""Damaged, incomplete and malicious checkpoint folders: each is refused in a sentence, and nothing is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_sources import (
    CHATGLM2,
    NORM,
    QKV,
    entry,
    random_tensors,
    raw_safetensors,
    refused,
    write_bin,
    write_json,
    write_model,
)
from safetensors.torch import load_file

from glmquant import UnsafeFileError, inspect, plan_conversion
from glmquant.errors import SourceError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound checkpoint in one file, to be damaged."""
    return write_model(tmp_path / "model", CHATGLM2, random_tensors(CHATGLM2))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint in three shards, to be damaged."""
    return write_model(tmp_path / "model", CHATGLM2, random_tensors(CHATGLM2), shards=3)


def edit_index(folder: Path, **weight_map: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update({name.replace("__", "."): file for name, file in weight_map.items()})
    write_json(folder / INDEX, index)


def refused_everywhere(folder: Path, out: Path, *words: str, error: type[SourceError] = SourceError) -> str:
    """`convert` refuses it, and so does everything else that opens a folder."""
    message = refused(folder, out, *words, error=error)
    for look in (plan_conversion, inspect):
        with pytest.raises(error) as caught:
            look(folder)
        assert str(caught.value) == message
    return message


# Shards and their index.


def test_a_missing_shard(sharded: Path, out: Path) -> None:
    (sharded / SHARD).unlink()
    refused_everywhere(sharded, out, SHARD, "is missing from", str(sharded), "6 tensors", "download")


def test_shards_without_an_index(sharded: Path, out: Path) -> None:
    (sharded / INDEX).unlink()
    refused_everywhere(sharded, out, str(sharded), "no index", INDEX)


@pytest.mark.parametrize("name", ["absent.safetensors", "", ".", "folder", "~/x", "x" * 300], ids=repr)
def test_an_index_that_names_no_file(name: str, sharded: Path, out: Path) -> None:
    (sharded / "folder").mkdir()
    edit_index(sharded, **{QKV: name})
    refused_everywhere(sharded, out, repr(name[:50])[:-1], "missing", INDEX)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "folder/../../x", "..\\x", "C:\\x.safetensors"],
    ids=["parent", "absolute", "deep", "backslash", "drive"],
)
def test_an_index_that_leads_out_of_the_folder(name: str, sharded: Path, tmp_path: Path, out: Path) -> None:
    shutil.copy(sharded / SHARD, tmp_path / "model.safetensors")  # what it hopes for is there
    edit_index(sharded, **{QKV: name})
    refused_everywhere(sharded, out, INDEX, repr(name), "outside", error=UnsafeFileError)


def test_an_index_with_an_impossible_name(sharded: Path, out: Path) -> None:
    edit_index(sharded, **{QKV: "a\0b"})
    refused_everywhere(sharded, out, INDEX, r"'a\x00b'")


@pytest.mark.parametrize("file", ["model.safetensors", SHARD, "pytorch_model.bin"])
def test_a_link_out_of_the_folder(file: str, tmp_path: Path, out: Path) -> None:
    tensors = random_tensors(CHATGLM2)
    if file.endswith(".bin"):
        folder = write_bin(tmp_path / "model", CHATGLM2, tensors)
    else:
        folder = write_model(tmp_path / "model", CHATGLM2, tensors, shards=3 if "-of-" in file else 1)
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    refused_everywhere(folder, out, file, "link", str(tmp_path / "elsewhere"), error=UnsafeFileError)


def test_only_the_blobs_of_its_own_cache_may_be_linked_to(model: Path, tmp_path: Path, out: Path) -> None:
    snapshot = tmp_path / "models--mine" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    foreign = tmp_path / "models--other" / "blobs"
    foreign.mkdir(parents=True)
    (snapshot / "model.safetensors").rename(foreign / "sha")
    (snapshot / "model.safetensors").symlink_to("../../../models--other/blobs/sha")
    refused_everywhere(snapshot, out, "link", error=UnsafeFileError)


def test_a_circle_of_links(model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    refused(model, out, "model.safetensors")


def test_an_index_that_puts_a_tensor_into_a_wrong_shard(sharded: Path, out: Path) -> None:
    assert QKV not in load_file(sharded / SHARD)
    edit_index(sharded, **{QKV: SHARD})
    refused_everywhere(sharded, out, QKV, SHARD, "does not hold it")


@pytest.mark.parametrize("value", [None, [], {}, "x", {"a": 3}, {"a": None}], ids=repr)
def test_an_index_without_a_weight_map(value: Any, sharded: Path, out: Path) -> None:
    write_json(sharded / INDEX, {"weight_map": value})
    refused_everywhere(sharded, out, INDEX, "weight_map")


# Safetensors.

WITHIN = {"a": entry("F16", [16], 0, 32), "b": entry("F16", [16], 32, 64)}
HEADERS = {
    "overlapping": {**WITHIN, "b": entry("F16", [16], 16, 48)},
    "with-a-hole": {"a": entry("F16", [8], 0, 16), "b": entry("F16", [24], 16 + 8, 64)},
    "negative-offset": {"a": entry("F16", [16], -32, 0)},
    "backwards": {"a": entry("F16", [16], 32, 0)},
    "beyond-the-file": {"a": entry("F16", [1 << 40], 0, 1 << 41)},
    "beyond-64-bits": {"a": entry("F16", [1 << 62, 1 << 62], 0, 1 << 125)},
    "other-size-than-shape": {"a": entry("F16", [16], 0, 64)},
    "negative-shape": {"a": entry("F16", [-32], 0, 64)},
    "unknown-dtype": {"a": entry("F17", [32], 0, 64)},
    "no-json": b"\x93NUMPY, or anything else",
    "no-object": [WITHIN],
    "twice-the-same-name": json.dumps({"a": entry("F16", [16], 0, 32)}).encode()[:-1]
    + b", "
    + json.dumps({"a": entry("F16", [16], 32, 64)}).encode()[1:],
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies(header: Any, model: Path, out: Path) -> None:
    raw_safetensors(model / "model.safetensors", header, bytes(64))
    refused_everywhere(model, out, str(model / "model.safetensors"), "not a sound safetensors file")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_of_impossible_length(length: int, model: Path, out: Path) -> None:
    raw_safetensors(model / "model.safetensors", WITHIN, bytes(64), length=length)
    refused_everywhere(model, out, "model.safetensors", "not a sound safetensors file")


@pytest.mark.parametrize("size", [0, 7, 8, 200, -5000, -1])
def test_a_truncated_safetensors_file(size: int, sharded: Path, out: Path) -> None:
    file = sharded / SHARD
    file.write_bytes(file.read_bytes()[:size])
    refused_everywhere(sharded, out, str(file), "download it again")


def test_more_than_the_header_says(model: Path, out: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused_everywhere(model, out, "model.safetensors", "not a sound safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_says_how_to_get_the_weights(name: str, tmp_path: Path, out: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234567\n"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(pointer)
    write_json(tmp_path / "model" / "config.json", CHATGLM2)
    refused_everywhere(tmp_path / "model", out, name, "Git LFS pointer", "git lfs pull")


# Pickles.


class Payload:
    """What an attacker would put into a .bin."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_the_payload_works(tmp_path: Path) -> None:
    """Or the tests below prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "run")))
    assert (tmp_path / "run").exists()


def pickled_as_a_weight(marker: Path) -> bytes:
    data = io.BytesIO()
    torch.save({**random_tensors(CHATGLM2), NORM: Payload(marker)}, data)
    return data.getvalue()


def pickled_in_the_old_way(marker: Path) -> bytes:
    data = io.BytesIO()
    torch.save({NORM: Payload(marker)}, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def pickled_plainly(marker: Path) -> bytes:
    return pickle.dumps({NORM: Payload(marker)})


def pickled_in_a_tar(marker: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            content = pickled_plainly(marker)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (pickled_as_a_weight, UnsafeFileError, ("more than weights", "system", "nothing in it was run")),
        (pickled_in_the_old_way, SourceError, ("torch before 1.6",)),
        (pickled_plainly, SourceError, ("not a zip-format torch file",)),
        (pickled_in_a_tar, SourceError, ("not a zip-format torch file",)),
    ],
    ids=["zip", "old", "plain", "tar"],
)
def test_no_pickle_is_run(
    make: Callable[[Path], bytes], error: type[SourceError], words: tuple[str, ...], tmp_path: Path, out: Path
) -> None:
    folder = write_bin(tmp_path / "model", CHATGLM2, {})
    (folder / "pytorch_model.bin").write_bytes(make(tmp_path / "run"))
    message = refused_everywhere(
        folder, out, str(folder / "pytorch_model.bin"), "safetensors", *words, error=error
    )
    assert "weights_only" not in message  # torch's advice is to run it after all
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 3, 4, 100, 5000, -200, -1])
def test_a_truncated_bin(size: int, tmp_path: Path, out: Path) -> None:
    folder = write_bin(tmp_path / "model", CHATGLM2, random_tensors(CHATGLM2))
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    refused_everywhere(folder, out, str(file), "damaged", "ownload it again")


def test_a_zip_of_something_else(tmp_path: Path, out: Path) -> None:
    folder = write_bin(tmp_path / "model", CHATGLM2, {})
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("holiday/photo.jpg", b"...")
    refused_everywhere(folder, out, "pytorch_model.bin", "damaged")


WEIGHT = torch.zeros(2, 2)
NOT_WEIGHTS: dict[str, Any] = {
    "training-checkpoint": {"state_dict": {NORM: WEIGHT}, "epoch": 3},
    "list": [WEIGHT],
    "tensor": WEIGHT,
    "numbered": {1: WEIGHT},
    "sparse": {NORM: WEIGHT.to_sparse()},
    "meta": {NORM: WEIGHT.to("meta")},
    "complex": {NORM: WEIGHT.to(torch.complex64)},
}


@pytest.mark.parametrize("content", NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
def test_a_bin_of_something_else(content: Any, tmp_path: Path, out: Path) -> None:
    folder = write_bin(tmp_path / "model", CHATGLM2, content)
    refused_everywhere(folder, out, "pytorch_model.bin")
