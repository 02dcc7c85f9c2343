"""What modelscope_hub asks a hub for."""

from __future__ import annotations

import base64
import json
import mmap
import re
from typing import TYPE_CHECKING, Any

from .protocol import TOKEN, Answer, Request
from .repositories import Repository

if TYPE_CHECKING:
    from .server import HubServer

PREFIXES = ("/api/v1/", "/openapi/")
_ID = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (rf"/api/v1/models/{_ID}/repo/files", "_files"),
    (rf"/api/v1/models/{_ID}/repo", "_file"),
    (rf"/api/v1/models/{_ID}/revisions", "_revisions"),
    (rf"/api/v1/models/{_ID}", "_model"),
)
_WRITING = (
    (r"/api/v1/models", "_create"),
    (rf"/api/v1/repos/models/{_ID}/info/lfs/objects/batch", "_batch"),
    (rf"/api/v1/repos/models/{_ID}/commit/(?P<revision>.+)", "_commit"),
)


def answer(server: HubServer, request: Request) -> Answer:
    """Answer any request."""
    if request.method == "POST":
        return _written(server, request)
    for pattern, route in _ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match is None or request.method not in ("GET", "HEAD"):
            continue
        repository = server.repositories.get(match["name"])
        if repository is None:
            return _error(404, 10010205001, "record not found")
        if repository.private and request.token != TOKEN:
            return _error(404 if request.token is None else 403, 10010205001, "no permission")
        if repository.gated and request.token != TOKEN:
            return _error(403, 10020101403, "access to this model has to be applied for")
        asked = request.query.get("Revision", "master")
        revision = repository.resolve(repository.default if asked == "master" else asked)
        found: Answer = globals()[route](server, request, repository, revision)
        return found
    return _error(404, 404, f"no such route: {request.method} {request.path}")


def _written(server: HubServer, request: Request) -> Answer:
    if request.token != TOKEN:
        return _error(401 if request.token is None else 403, 10010205002, "no permission to write")
    for pattern, route in _WRITING:
        match = re.fullmatch(pattern, request.path)
        if match is not None:
            values = match.groupdict()
            if "name" in values:
                values["repository"] = server.repositories.get(values.pop("name"))
                if values["repository"] is None:
                    return _error(404, 10010205001, "record not found")
            made: Answer = globals()[route](server, json.loads(request.body), **values)
            return made
    return _error(404, 404, f"no such route: {request.method} {request.path}")


def _create(server: HubServer, asked: dict[str, Any]) -> Answer:
    name = f"{asked['Path']}/{asked['Name']}"
    if name in server.repositories:
        return _error(400, 10010101009, "already exists")
    repository = server.add(name, private=asked["Visibility"] == 1, default="master")
    repository.commit({"README.md": f"license: {asked['License']}".encode(), "configuration.json": b"{}"})
    return _data({"Path": asked["Path"], "Name": asked["Name"]})


def _batch(server: HubServer, asked: dict[str, Any], repository: Repository) -> Answer:
    objects = []
    for wanted in asked["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if server.content(wanted["oid"]) is None:
            entry["actions"] = {"upload": {"href": f"{server.storage_url}/lfs-upload/{wanted['oid']}"}}
        objects.append(entry)
    return _data({"objects": objects})


def _commit(server: HubServer, asked: dict[str, Any], repository: Repository, revision: str) -> Answer:
    files: dict[str, bytes | mmap.mmap] = {}
    for action in asked["actions"]:
        content = base64.b64decode(action["content"])
        if action["type"] == "lfs":
            content = server.content(action["sha256"])
            if content is None:
                return _error(400, 10010205003, f"{action['path']} was not uploaded")
        files[action["path"]] = content
    return _data(
        {"CommitId": repository.commit(files, repository.default if revision == "master" else revision)}
    )


def _error(status: int, code: int, message: str) -> Answer:
    return Answer.of_json({"Code": code, "Message": message, "Success": False}, status)


def _data(value: object) -> Answer:
    return Answer.of_json({"Code": 200, "Data": value, "Message": "success", "Success": True})


def _files(server: HubServer, request: Request, repository: Repository, revision: str | None) -> Answer:
    if revision is None:  # this is how ModelScope says so
        return _data({"Files": None, "IsVisual": 0, "LatestCommitter": None})
    entries = [
        {
            "Name": name.rpartition("/")[2],
            "Path": name,
            "Type": "blob",
            "Size": repository.size_of(name, file),
            "Sha256": repository.sha256_of(name, file),
            "IsLFS": file.large,
            "Revision": revision,
            "CommittedDate": 1700000000,
        }
        for name, file in repository.commits[revision].items()
    ]
    return _data({"Files": entries, "IsVisual": 0, "LatestCommitter": {"Id": "", "ShortId": revision[:8]}})


def _file(server: HubServer, request: Request, repository: Repository, revision: str | None) -> Answer:
    stored = repository.commits.get(revision or "", {}).get(request.query.get("FilePath", ""))
    if stored is None:
        return _error(404, 10010205001, "file not found")
    headers = {"X-Linked-ETag": f'"{stored.sha256}"'}
    # Small files come without a redirect, and whole whatever the range.
    return Answer(200, headers, file=stored, ranges=stored.large)


def _revisions(server: HubServer, request: Request, repository: Repository, revision: str | None) -> Answer:
    names = ["master" if name == repository.default else name for name in repository.branches]
    branches = [{"Revision": name, "CreatedAt": 1700000000} for name in names]
    return _data({"RevisionMap": {"Branches": branches, "Tags": []}})


def _model(server: HubServer, request: Request, repository: Repository, revision: str | None) -> Answer:
    owner, _, name = repository.name.partition("/")
    return _data({"Path": owner, "Name": name, "Visibility": 1 if repository.private else 5, "Id": 1})
