"""The files of a checkpoint folder: which hold weights, and which may be read at all."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError, UnsafeFileError

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_FILE = "pytorch_model.bin"
GGUF_FILE = "model.gguf"

CARRIED = (
    "generation_config.json",
    "tokenizer.json", "tokenizer.model", "ice_text.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "LICENSE*", "MODEL_LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files beside the weights that are of use; none of them is code."""


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a folder are.

    Attributes:
        shards: file names inside the folder, in order.
        weight_map: tensor name -> shard as the index states it; None when there is no index.
    """

    shards: tuple[str, ...]
    weight_map: dict[str, str] | None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `SourceError` says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; is this a model folder?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); download the file again.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def find_weights(folder: Path, listed: Container[str] | None = None) -> WeightFiles:
    """Find the weight files of `folder`, safetensors before ``.bin``, and check that each is there.

    Args:
        folder: where the index is.
        listed: the files that there are, where they are not in `folder` but on a hub.

    Raises:
        SourceError: there are none, a shard is missing, or an index is malformed.
        UnsafeFileError: an index names a file outside the folder.
    """
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS_FILE), (BIN_INDEX, BIN_FILE)):
        if _is_there(folder, index, listed):
            return _from_index(folder, index, listed)
        if _is_there(folder, single, listed):
            check_inside(folder, single, "the checkpoint folder")
            return WeightFiles((single,), None)
    if _is_there(folder, GGUF_FILE, listed):
        check_inside(folder, GGUF_FILE, "the checkpoint folder")
        return WeightFiles((GGUF_FILE,), None)
    pieces = sorted(p.name for p in folder.glob("*-of-*") if p.suffix in (".safetensors", ".bin"))
    if pieces:
        raise SourceError(
            f"{folder} holds shards ({pieces[0]}, ...) but no index file beside them; "
            f"download {SAFETENSORS_INDEX} or {BIN_INDEX} too."
        )
    raise SourceError(
        f"{folder} holds no weights: none of {SAFETENSORS_INDEX}, {SAFETENSORS_FILE}, {BIN_INDEX}, {BIN_FILE}."
    )


def _from_index(folder: Path, index: str, listed: Container[str] | None) -> WeightFiles:
    weight_map = read_json(folder / index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(value, str) for value in weight_map.values())
    ):
        raise SourceError(f"{folder / index} has no usable weight_map; download the file again.")
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        check_inside(folder, shard, index)
        if not _is_there(folder, shard, listed):
            wanted = sum(value == shard for value in weight_map.values())
            raise SourceError(
                f"shard {shard[:100]!r} is missing from {folder}: {index} expects it to hold {wanted} "
                f"tensor{'s'[: wanted > 1]}; download it again."
            )
    return WeightFiles(shards, weight_map)


def check_inside(folder: Path, name: str, named_by: str) -> None:
    """Refuse a file name that leads out of `folder`, by its spelling or through a link.

    A Hugging Face cache snapshot is the one exception: its files are links into ``blobs`` beside
    ``snapshots``, which is part of the same download.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UnsafeFileError(
            f"{named_by} names {name!r}, which is outside {folder}; nothing was read. "
            "Download the checkpoint again from a source you trust."
        )
    root = folder.resolve()
    try:
        target = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a circle of links
        raise SourceError(f"{named_by} names {name!r}, which no file can be called.") from None
    if target.is_relative_to(root):
        return
    if root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs"):
        return
    raise UnsafeFileError(
        f"{folder / name} is a link to {target}, outside the checkpoint folder; "
        "put the file itself there, or pass the folder that holds it."
    )


def first_bytes(path: Path) -> bytes:
    """The beginning of a weight file, which must not be what Git leaves in its place.

    Raises:
        SourceError: it is a Git LFS pointer, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
    if start.startswith(b"version https://git-lfs"):
        raise SourceError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {path.parent}, or download the "
            "model again."
        )
    return start


def _is_there(folder: Path, name: str, listed: Container[str] | None) -> bool:
    if listed is not None:
        return name in listed
    try:
        return (folder / name).is_file()
    except OSError:  # a name that is too long
        return False
