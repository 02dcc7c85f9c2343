"""What huggingface_hub asks a hub for, downloading."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .protocol import TOKEN, Answer, Request
from .repositories import Repository

if TYPE_CHECKING:
    from .server import HubServer

_ID = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_ID}(/revision/(?P<revision>.+))?", "info"),
    ("GET|HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "file"),
    ("GET|HEAD", r"/lfs/(?P<sha256>\w+)/.*", "large"),
)  # fmt: skip


def answer(server: HubServer, request: Request) -> Answer:
    """Answer any request."""
    for methods, pattern, route in _ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match is None or request.method not in methods.split("|"):
            continue
        values = {k: v for k, v in match.groupdict().items() if v is not None}
        if route == "large":
            return _large(server, **values)
        repository = server.repositories.get(values.pop("name"))
        if repository is None or (repository.private and request.token != TOKEN):
            return _error(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
        if repository.gated and request.token != TOKEN and route != "info":
            return _error(401 if request.token is None else 403, "GatedRepo", "Access is restricted")
        revision = repository.resolve(values.pop("revision", "main"))
        if revision is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        return _READING[route](server, repository, revision, **values)
    return _error(404, "", f"no such route: {request.method} {request.path}")


def _error(status: int, code: str, message: str) -> Answer:
    return Answer.of_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


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


def _large(server: HubServer, sha256: str) -> Answer:
    for repository in server.repositories.values():
        for files in repository.commits.values():
            for stored in files.values():
                if stored.sha256 == sha256:
                    return Answer(200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, file=stored)
    return _error(404, "", "no such object")


_READING = {"info": _info, "file": _file}
