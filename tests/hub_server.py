"""A server on this machine that speaks as much of the Hugging Face Hub's API as uploads and downloads take."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_writer"


@dataclass
class Hub:
    """Repositories by name, each a commit and its files; and what the next requests to some path are answered with.

    ``failures``: (pattern of the path, status or "drop"); each serves one request.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    failures: list[tuple[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        self.files.setdefault(repository, {}).update(files)
        self.commits[repository] = hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()
        return self.commits[repository]


@contextmanager
def hub() -> Iterator[Hub]:
    """A running one."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            state.requests.append(f"{self.command} {path}")
            for failure in state.failures:
                if re.search(failure[0], path):
                    state.failures.remove(failure)
                    if failure[1] == "drop":
                        self.close_connection = True
                        self.connection.close()
                        return
                    self.answer(failure[1], {"error": "made to fail"}, Retry_After="1")
                    return
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if match := re.fullmatch(r"/(\w[^/]*/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*match.groups(), authorized)
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
                self.answer(200, state.files[match[1]][match[2]])
            elif path == "/api/repos/create":
                self.create(json.loads(body), authorized)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                lines = [json.loads(line) for line in body.splitlines()]
                found = [line["value"] for line in lines if line["key"] == "file"]
                oid = state.commit(match[1], {file["path"]: base64.b64decode(file["content"]) for file in found})
                address = f"{state.url}/{match[1]}/commit/{oid}"
                self.answer(200, {"success": True, "commitOid": oid, "commitUrl": address})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
                self.describe(match[1])
            else:
                self.answer(200, {"errors": [], "warnings": []} if "validate" in path else {})

        def create(self, asked: dict[str, Any], authorized: bool) -> None:
            repository = f"{asked['organization']}/{asked['name']}"
            if not authorized:
                self.answer(401, {"error": "Invalid credentials"})
                return
            if asked["organization"] == "closed":
                self.answer(403, {"error": "no write access"})
                return
            known = repository in state.files
            state.files.setdefault(repository, {})
            if asked.get("private") or asked.get("visibility") == "private":
                state.private.add(repository)
            self.answer(409 if known else 200, {"url": f"{state.url}/{repository}", "name": repository})

        def describe(self, repository: str) -> None:
            if repository not in state.files:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in state.files[repository]]
            self.answer(200, {"id": repository, "sha": state.commits.get(repository), "siblings": siblings})

        def resolve(self, repository: str, revision: str, name: str, authorized: bool) -> None:
            if repository not in state.files or (repository in state.private and not authorized):
                self.answer(401, {"error": "no such repository"}, X_Error_Code="RepoNotFound")
                return
            commit, content = state.commits[repository], state.files[repository].get(name)
            if revision not in ("main", commit):
                self.answer(404, {}, X_Error_Code="RevisionNotFound")
            elif content is None:
                self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            elif name.endswith(".safetensors"):  # large files lie on another host
                digest = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(
                    302,
                    Location=f"http://localhost:{server.server_port}/cdn/{repository}/{name}",
                    X_Repo_Commit=commit,
                    X_Linked_ETag=digest,
                    X_Linked_Size=str(len(content)),
                )
            else:
                self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

        do_GET = do_HEAD = do_POST = handle_request

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
