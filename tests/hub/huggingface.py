"""What huggingface_hub asks a hub for."""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import re
from typing import TYPE_CHECKING, Any

from .protocol import TOKEN, Answer, Request
from .repositories import Repository, StoredFile

if TYPE_CHECKING:
    from .server import HubServer

_ID = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_ID}(/revision/(?P<revision>.+))?", "info"),
    ("GET|HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "file"),
    ("GET|HEAD", r"/lfs/(?P<sha256>\w+)/.*", "large"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "yaml"),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs-upload/(?P<sha256>\w+)", "upload"),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>.+)", "commit"),
)  # fmt: skip


def answer(server: HubServer, request: Request) -> Answer:
    """Answer any request."""
    for methods, pattern, route in _ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match is None or request.method not in methods.split("|"):
            continue
        values = {k: v for k, v in match.groupdict().items() if v is not None}
        if route in _PLAIN:
            return _PLAIN[route](server, request, **values)
        repository = server.repositories.get(values.pop("name"))
        if repository is None or (repository.private and request.token != TOKEN):
            return _error(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
        if repository.gated and request.token != TOKEN and route != "info":
            return _error(401 if request.token is None else 403, "GatedRepo", "Access is restricted")
        if route in _WRITING:
            return _refusal(request) or _WRITING[route](server, repository, request.body, **values)
        revision = repository.resolve(values.pop("revision", "main"))
        if revision is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        return _READING[route](server, repository, revision, **values)
    return _error(404, "", f"no such route: {request.method} {request.path}")


def _error(status: int, code: str, message: str) -> Answer:
    return Answer.of_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


def _refusal(request: Request) -> Answer | None:
    if request.token == TOKEN:
        return None
    return _error(401 if request.token is None else 403, "", "You do not have the right to do that")


def _info(server: HubServer, repository: Repository, revision: str) -> Answer:
    siblings = []
    for name, file in repository.commits[revision].items():
        entry: dict[str, Any] = {"rfilename": name, "size": repository.size_of(name, file)}
        entry["blobId"] = file.blob_id
        if file.large:
            sha256 = repository.sha256_of(name, file)
            entry["lfs"] = {"sha256": sha256, "size": entry["size"], "pointerSize": 134}
        siblings.append(entry)
    return Answer.of_json({
        "id": repository.name, "modelId": repository.name, "sha": revision, "private": repository.private,
        "gated": "manual" if repository.gated else False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
    })  # fmt: skip


def _file(server: HubServer, repository: Repository, revision: str, file: str) -> Answer:
    stored = repository.commits[revision].get(file)
    if stored is None:
        return _error(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": revision, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
    if not stored.large:
        return Answer(200, headers, file=stored)
    headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.data))}
    return Answer(302, {**headers, "Location": f"{server.storage_url}/lfs/{stored.sha256}/{file}"})


def _large(server: HubServer, request: Request, sha256: str) -> Answer:
    for repository in server.repositories.values():
        stored = repository.stored(sha256)
        if stored is not None:
            return Answer(200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, file=stored)
    return _error(404, "", "no such object")


def _create(server: HubServer, request: Request) -> Answer:
    asked = json.loads(request.body)
    name = f"{asked['organization']}/{asked['name']}"
    refusal = _refusal(request)
    if refusal is not None:
        return refusal
    status = 409 if name in server.repositories else 200
    if status == 200:
        server.add(name, private=asked.get("visibility") == "private").commit(
            {".gitattributes": b"*.safetensors filter=lfs"}
        )
    return Answer.of_json({"url": f"{server.url}/{name}", "name": name}, status)


def _yaml(server: HubServer, request: Request) -> Answer:
    return Answer.of_json({"errors": [], "warnings": []})


def _preupload(server: HubServer, repository: Repository, body: bytes, revision: str) -> Answer:
    held = repository.commits[repository.branches[revision]]
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if StoredFile.of(file["path"], b"").large else "regular",
            "shouldIgnore": False,
            "oid": held[file["path"]].etag if file["path"] in held else None,
        }
        for file in json.loads(body)["files"]
    ]
    return Answer.of_json({"files": files})


def _batch(server: HubServer, repository: Repository, body: bytes) -> Answer:
    objects = []
    for asked in json.loads(body)["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if server.content(asked["oid"]) is None:
            entry["actions"] = {"upload": {"href": f"{server.storage_url}/lfs-upload/{asked['oid']}"}}
        objects.append(entry)
    return Answer.of_json({"transfer": "basic", "objects": objects})


def _upload(server: HubServer, request: Request, sha256: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != sha256:
        return _error(400, "", "the content has another hash")
    server.uploads[sha256] = request.body
    return Answer(200)


def _commit(server: HubServer, repository: Repository, body: bytes, revision: str) -> Answer:
    files: dict[str, bytes | mmap.mmap] = {}
    for line in body.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            content = server.content(value["oid"])
            if content is None:
                return _error(400, "", f"{value['path']} was not uploaded")
            files[value["path"]] = content
    made = repository.commit(files, revision)
    return Answer.of_json({
        "commitUrl": f"{server.url}/{repository.name}/commit/{made}", "commitOid": made, "success": True,
    })  # fmt: skip


_READING = {"info": _info, "file": _file}
_WRITING = {"preupload": _preupload, "batch": _batch, "commit": _commit}
_PLAIN = {"large": _large, "create": _create, "yaml": _yaml, "upload": _upload}
