"""A small model hub on loopback, which speaks what huggingface_hub's own client asks: repositories,
branches, commits with files in line or by LFS, and reading any revision of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ = "hf_may_write_everything", "hf_may_read_alone"
_LFS_BYTES = 4096
_PATHS = {
    "create": r"/api/repos/create",
    "yaml": r"/api/validate-yaml",
    "preupload": r"/api/models/([\w.-]+/[\w.-]+)/preupload/([^/]+)",
    "commit": r"/api/models/([\w.-]+/[\w.-]+)/commit/([^/]+)",
    "branch": r"/api/models/([\w.-]+/[\w.-]+)/branch/([^/]+)",
    "batch": r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch",
    "lfs": r"/lfs/([0-9a-f]{64})",
    "tree": r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)/?",
    "info": r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?",
    "resolve": r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)",
}


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Pull requests, as commits."""

    def at(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def add(self, files: dict[str, bytes], message: str, branch: str | None) -> str:
        before = self.commits.get(self.branches.get(branch or "main", ""), {})
        after = {**before, **files}
        told = repr((sorted(after.items()), message, len(self.commits))).encode()
        commit = hashlib.sha1(told, usedforsecurity=False).hexdigest()
        self.commits[commit], self.messages[commit] = after, message
        if branch is None:
            self.requests.append(commit)
        else:
            self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for name, pattern in _PATHS.items():
            if found := re.fullmatch(pattern, path):
                writes = self.command in ("POST", "PUT") and name != "lfs"
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if writes and token not in (WRITE, READ):
                    return self.fail(401, "Invalid credentials in Authorization header")
                if writes and token == READ and name != "yaml":
                    return self.fail(403, "you have read access only")
                return getattr(self, name)(body, *found.groups())
        self.fail(404, "Not Found")

    # --- writing ---

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.fail(409, "You already created this model repo", name=name)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.branches["main"] = repository.add({".gitattributes": b"*"}, "initial", "main")
        self.hub.repositories[name] = repository
        self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def yaml(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            return self.fail(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        if name not in self.hub.repositories:
            return self.fail(404, "Repository not found", "RepoNotFound")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > _LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def lfs(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        said = [json.loads(line) for line in body.splitlines()]
        files, message = {}, ""
        for line in said:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        asks = "create_pr=1" in self.path
        commit = self.hub.repositories[name].add(files, message, None if asks else branch)
        url = f"{self.hub.url}/{name}"
        self.answer({
            "success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}",
            "pullRequestUrl": f"{url}/discussions/1",
        })  # fmt: skip

    # --- reading ---

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.fail(404, "Repository not found", "RepoNotFound")
            return None
        commit = repository.at(revision)
        if commit is None:
            self.fail(404, "Revision not found", "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if there := self.found(name, revision or "main"):
            files = [{"rfilename": path} for path in there[1]]
            self.answer({"id": name, "sha": there[0], "siblings": files, "tags": []})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if there := self.found(name, revision):
            self.answer([
                {"type": "file", "path": path, "oid": "0" * 40, "size": len(data)}
                for path, data in there[1].items()
            ])  # fmt: skip

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if there := self.found(name, revision):
            if path not in there[1]:
                return self.fail(404, "Entry not found", "EntryNotFound")
            data = there[1][path]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.send(200, data, {"ETag": etag, "X-Repo-Commit": there[0]})

    # --- answers ---

    def answer(self, said: Any) -> None:
        self.send(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, message: str, code: str = "", name: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        said = {"error": message, "url": f"{self.hub.url}/{name}"}
        self.send(status, json.dumps(said).encode(), headers)

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
