"""A stand-in for the Hugging Face Hub: a server on this machine with those calls of its HTTP interface that a push makes.

It is not the Hub. What huggingface_hub sends is real; the answers are those that the Hub's interface is documented to give.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, USER = "hf_" + "x" * 20 + "StandIn", "someone"
LARGE = (".safetensors", "tokenizer.json")  # go to the storage of large files
Answer = tuple[int, Any, dict[str, str]]
NOT_FOUND: Answer = (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})


@dataclass
class Hub:
    """What the stand-in has: repositories by name, each with `private`, `files` and `commits`; uploaded large files by SHA-256."""

    address: str = ""
    repositories: dict[str, Any] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    broken: tuple[str, int] | None = None  # part of a path, and the status that it answers with

    def answer(self, method: str, path: str, token: str, body: bytes) -> Answer:
        self.calls.append(f"{method} {path}")
        if self.broken is not None and self.broken[0] in path:
            return self.broken[1], {"error": "out of order"}, {}
        if path.startswith("/large/"):  # its address is the secret
            return self._store(path.rpartition("/")[2], body)
        if token != TOKEN:
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": USER, "auth": {"type": "access_token"}}, {}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return NOT_FOUND
        if rest == ["preupload", "main"]:
            files = [self._mode(one["path"]) for one in json.loads(body)["files"]]
            return 200, {"files": files}, {}
        if rest == ["commit", "main"]:
            return self._commit(f"{owner}/{name}", body)
        return 200, {"id": f"{owner}/{name}", "private": repository["private"], "siblings": [], "sha": "0" * 40}, {}

    def _mode(self, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False, "oid": None}

    def _validate(self, asked: dict[str, Any]) -> Answer:
        data = yaml.safe_load(asked["content"].split("---\n")[1])
        errors = [] if isinstance(data.get("license"), str) else [{"message": '"license" must be a string'}]
        return (400, {"errors": errors, "warnings": []}, {}) if errors else (200, {"errors": [], "warnings": []}, {})

    def _create(self, asked: dict[str, Any]) -> Answer:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {asked['organization']!r}"}, {}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}, {}
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = {"private": private, "files": {}, "commits": []}
        return 200, {"url": f"{self.address}/{name}", "name": name}, {}

    def _batch(self, asked: dict[str, Any]) -> Answer:
        objects = [{**one, "actions": {"upload": {"href": f"{self.address}/large/{one['oid']}"}}} for one in asked["objects"]]
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _store(self, digest: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != digest:
            return 400, {"error": "not the content that was announced"}, {}
        self.large[digest] = body
        return 200, {}, {}

    def _commit(self, name: str, body: bytes) -> Answer:
        repository, (head, *lines) = self.repositories[name], [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            repository["files"][value["path"]] = self.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        repository["commits"].append(head["value"]["summary"])
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}"}, {}


@contextmanager
def hub() -> Iterator[Hub]:
    """Start the stand-in on a free port of this machine."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content, headers = found.answer(self.command, self.path.partition("?")[0], token, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    found.address = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        http.shutdown()
        http.server_close()
