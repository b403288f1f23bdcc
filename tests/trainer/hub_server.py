"""A double of the Hub's API: the requests that an upload makes, repositories in memory, large files by plain LFS and not Xet."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.http_double import HttpDouble, QuietHandler

LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """One repository: its files by name, and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])

    def oid(self, path: str) -> str | None:
        """As Git knows it, and LFS for large files."""
        content = self.files.get(path)
        if content is None:
            return None
        if path.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(HttpDouble):
    """Serves on a free port while in its block; `status`: answers everything with that."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.status: int | None = None
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.sent = 0
        super().__init__(self._handler())

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.uri}/{name}"}
        self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.uri}/{name}", "name": name}

    def validate(self, card: str) -> tuple[int, Any]:
        """The Hub takes no base model that is none of its own."""
        base = yaml.safe_load(card.split("---")[1]).get("base_model")
        if base is None or re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return 200, {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": f'"base_model" with value "{base}" is not valid'}], "warnings": []}

    def preupload(self, repository: Repository, asked: dict[str, Any]) -> tuple[int, Any]:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": repository.oid(file["path"]),
            }
            for file in asked["files"]
        ]
        return 200, {"files": files}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        # What the store has is not asked for again.
        objects = [
            item
            if item["oid"] in self.large
            else {**item, "actions": {"upload": {"href": f"{self.uri}/lfs/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(hashlib.sha1(body).hexdigest())
        oid = repository.commits[-1]
        return 200, {"commitOid": oid, "commitUrl": f"{self.uri}/{name}/commit/{oid}", "success": True}

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        if self.status is not None:
            return self.status, {"error": "refused"}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.large[oid] = body
            self.sent += 1
            return 200, {}
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        owner, name, action = (path.removeprefix("/api/models/").split("/") + [""] * 3)[:3]
        repository = self.repositories[f"{owner}/{name}"]
        if action == "preupload":
            return self.preupload(repository, json.loads(body))
        if action == "commit":
            return self.commit(f"{owner}/{name}", body)
        if action == "tree":
            files = repository.files.items()
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": repository.oid(p)} for p, c in files]
        siblings = [{"rfilename": path} for path in repository.files]
        return 200, {"id": f"{owner}/{name}", "sha": repository.commits[-1], "siblings": siblings, "tags": []}

    def _handler(self) -> type[QuietHandler]:
        server = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                body = self.body()
                path = urlsplit(self.path).path
                code, answer = server.answer(self.command, path, self.headers.get("Authorization"), body)
                self.reply(code, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            do_GET = do_POST = do_PUT = _any

        return Handler
