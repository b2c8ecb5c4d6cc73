"""A stand-in for the Hub's HTTP API on 127.0.0.1, as far as huggingface_hub calls it for push and pull.

It stores repositories as commits of {path: content}; `*.h5` and `*.safetensors` go through the LFS protocol. Tests look
at `requests`, and make the hub misbehave with `hook` (called with the method and the path before the answer) and
`served` (other bytes for a path than the commit has).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".h5", ".safetensors"))


@dataclass
class RepoState:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = json.dumps([sorted((p, blob_sha1(d)) for p, d in files.items()), len(self.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.commits[self.branches["main"]]


class Misbehaviour(Exception):
    """Raised by a hook: answer with this status, or cut the answer after so many bytes."""

    def __init__(self, status: int | None = None, cut: int | None = None, extra: bytes = b""):
        self.status, self.cut, self.extra = status, cut, extra


class Hub:
    """The server; `with Hub() as hub: hub.url`."""

    def __init__(self, token: str | None = None):
        self.repos: dict[str, RepoState] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.hook: Callable[[str, str], None] = lambda method, path: None
        self.served: dict[str, bytes] = {}
        self.token = token
        self.lock = threading.RLock()
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, part: str) -> int:
        return sum(1 for m, p, _ in self.requests if m == method and part in p)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunked()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((method, path, self.headers.get("Range")))
        cut, extra = None, b""
        try:
            self.hub.hook(method, path)
        except Misbehaviour as wrong:
            if wrong.status is not None:
                return self._json(wrong.status, {"error": "the hub is told to fail"})
            cut, extra = wrong.cut, wrong.extra
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        with self.hub.lock:
            route = self._route(method, path, body)
        if isinstance(route, tuple):
            return self._json(*route)
        self._bytes(path, route, cut, extra)

    def _chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _bytes(self, path: str, data: bytes, cut: int | None, extra: bytes) -> None:
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked:
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
        body = data[start:]
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest() if is_lfs(path) else blob_sha1(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if extra:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (body, extra, b""):
                self.wfile.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _route(self, method: str, path: str, body: bytes):
        parts = path.strip("/").split("/")
        hub = self.hub
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            return (200, {"warnings": [], "errors": []}) if text.startswith("---\n") else (400, {"errors": ["no yaml"]})
        if parts[0] == "lfs":
            if method == "PUT":
                if hashlib.sha256(body).hexdigest() != parts[1]:
                    return 400, {"error": "wrong content"}
                hub.lfs[parts[1]] = body
            return (200, {}) if parts[1] in hub.lfs else (404, {})
        if parts[0] == "datasets" and path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "datasets"]:
            return self._api(method, parts[2:], body)
        if parts[0] == "datasets" and "resolve" in parts:
            at = parts.index("resolve")
            return self._resolve("/".join(parts[1:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return 404, {"error": f"no such route {method} {path}"}

    def _create(self, asked: dict):
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        url = {"url": f"{self.hub.url}/datasets/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {"error": "You already created this dataset repo", **url}
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = RepoState(private=private)
        self.hub.repos[name].commit("main", {".gitattributes": b"*.h5 filter=lfs\n"})
        return 200, url

    def _batch(self, asked: dict):
        objects = []
        for entry in asked["objects"]:
            known = entry["oid"] in self.hub.lfs
            href = f"{self.hub.url}/lfs/{entry['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": href, "header": {}}}
            objects.append({**entry, "authenticated": True, **({} if known else {"actions": actions})})
        return 200, {"transfer": "basic", "objects": objects}

    def _repo(self, name: str):
        repo = self.hub.repos.get(name)
        if repo is None:
            return None, (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if repo.gated:
            return None, (403, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        return repo, None

    def _api(self, method: str, parts: list[str], body: bytes):
        size = next((i for i, p in enumerate(parts) if p in ("revision", "tree", "preupload", "commit", "branch")),
                    len(parts))  # fmt: skip
        name, verb = "/".join(parts[:size]), parts[size] if size < len(parts) else "revision"
        repo, wrong = self._repo(name)
        if repo is None:
            return wrong
        revision = parts[size + 1] if size + 1 < len(parts) else "main"
        if verb == "branch":
            if revision in repo.branches:
                return 409, {"error": "Reference already exists"}
            repo.branches[revision] = repo.branches["main"]
            return 200, {}
        sha = repo.find(revision)
        if sha is None:
            return 404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.commits[sha]
        if verb == "revision":
            return 200, {"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": [], "downloads": 0,
                         "likes": 0, "disabled": False, "gated": False}  # fmt: skip
        if verb == "tree":
            return 200, [_entry(path, data) for path, data in sorted(files.items())] + [
                {"type": "directory", "path": "shards", "oid": "0" * 40, "size": 0}]  # fmt: skip
        if verb == "preupload":
            return 200, {"files": [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False,
                 **({"oid": blob_sha1(files[f["path"]])} if f["path"] in files else {})}
                for f in json.loads(body)["files"]]}  # fmt: skip
        return self._commit(name, repo, revision, sha, dict(files), body)

    def _commit(self, name: str, repo: RepoState, revision: str, sha: str, files: dict[str, bytes], body: bytes):
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (None, sha):
                return 412, {"error": "A commit has happened since"}
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return 400, {"error": "LFS object was not uploaded"}
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        new = repo.commit(revision, files)
        return 200, {"success": True, "commitOid": new, "commitUrl": f"{self.hub.url}/datasets/{name}/commit/{new}"}

    def _resolve(self, name: str, revision: str, path: str):
        repo, wrong = self._repo(name)
        if repo is None:
            return wrong
        sha = repo.find(revision)
        if sha is None or path not in repo.commits[sha]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        return self.hub.served.get(path, repo.commits[sha][path])


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_sha1(data)}
    if is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
