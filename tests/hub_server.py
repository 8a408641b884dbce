"""A Hugging Face Hub in memory, over HTTP on 127.0.0.1: what `huggingface_hub` needs to create, push, list and download.

    with MemoryHub() as hub, hub.client(home, token) as client:
        client.submit(function, *arguments).result()  # in another process, which talks to this Hub

Files of some kinds go through Git LFS, as on the real Hub; blobs are kept by content, whether committed or not.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import re
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "onlyForTheHubInMemory" * 2
LFS_SUFFIXES = (".safetensors", ".model")


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)  # branch -> commit
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class MemoryHub:
    """The server; `repositories`, `blobs` and `requests` ("METHOD path") are open to a test."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads_allowed: int | None = None  # blobs still accepted before uploads are refused
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "MemoryHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client(
        self, home, token: str | None = None, missing: tuple[str, ...] = (), **environment: str
    ) -> ProcessPoolExecutor:
        """One process that uses this Hub, with a cache of its own in `home`; in it the packages `missing` do not exist."""
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "2",
        }
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, initializer=_enter, initargs=(environment, missing))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content at a branch or commit."""
        repository = self.repositories[repo]
        return repository.commits[repository.branches.get(revision, revision)]

    def uploaded_blobs(self) -> list[str]:
        """The content hashes of accepted uploads, in order."""
        return [request.rsplit("/", 1)[1] for request in self.requests if request.startswith("PUT /blobs/")]


def _enter(environment: dict[str, str], missing: tuple[str, ...]) -> None:
    # In time: huggingface_hub reads the environment when the first submitted function is imported.
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(missing))


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _object_id(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_lfs(path) else _git_hash(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: MemoryHub

    def log_message(self, *args) -> None:
        """Silence the log of every request on stderr."""

    def _handle(self) -> None:
        path, self.content = unquote(urlparse(self.path).path), self._read()
        try:
            for methods, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    self.hub.requests.append(f"{self.command} {path}")
                    return self._send(*route(self, **match.groupdict()))
            raise _Refused(404, "EntryNotFound", f"no route for {self.command} {path}")
        except _Refused as error:
            self._send({"error": error.headers["X-Error-Message"]}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, body, status: int = 200, headers: dict | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, "", "Invalid username or password.")

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            # The real Hub does not tell a private repository from none.
            raise _Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if write:
            self._require_token()
        return repository

    def _commit(self, repo: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(repo)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha, repository.commits[sha]

    def who_am_i(self):
        self._require_token()
        return ({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}},)

    def create(self):
        self._require_token()
        fields = json.loads(self.content)
        repo = f"{fields.get('organization') or 'me'}/{fields['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return answer, 409, {"X-Error-Code": "RepoExists"}
        # huggingface_hub 2 says `visibility` where 1 says `private`.
        private = fields.get("visibility") == "private" or bool(fields.get("private"))
        repository = self.hub.repositories[repo] = Repository(private)
        repository.commit("main", {}, "initial commit")
        return (answer,)

    def create_branch(self, repo, revision):
        repository = self._repository(repo, write=True)
        if revision in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        start = json.loads(self.content or b"{}").get("startingPoint", "main")
        repository.branches[revision] = repository.branches[start]
        return ({},)

    def preupload(self, repo, revision):
        self._repository(repo, write=True)
        present = self._commit(repo, revision)[2]
        files = []
        for path in (entry["path"] for entry in json.loads(self.content)["files"]):
            mode = "lfs" if _is_lfs(path) else "regular"
            known = _object_id(path, present[path]) if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return ({"files": files},)

    def lfs_batch(self, repo):
        self._repository(repo, write=True)
        objects = []
        for entry in json.loads(self.content)["objects"]:
            entry = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
            if entry["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{entry['oid']}", "header": {}}}
            objects.append(entry)
        return ({"transfer": "basic", "objects": objects},)

    def put_blob(self, oid):
        if self.hub.uploads_allowed == 0:
            self.hub.requests.pop()
            raise _Refused(403, "", "uploads are interrupted")
        if self.hub.uploads_allowed is not None:
            self.hub.uploads_allowed -= 1
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise _Refused(400, "", "content does not have the announced hash")
        self.hub.blobs[oid] = self.content
        return (b"",)

    def commit(self, repo, revision):
        repository = self._repository(repo, write=True)
        files, message = dict(self._commit(repo, revision)[2]), ""
        for entry in map(json.loads, self.content.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files, message)
        return ({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""},)

    def info(self, repo, revision=None):
        repository, sha, files = self._commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        return ({"_id": "0", "id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings},)

    def tree(self, repo, revision, folder=None):
        files = self._commit(repo, revision)[2]
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries = []
        for path, content in inside.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if _is_lfs(path):
                entry["lfs"] = {"oid": _object_id(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return (entries,)

    def refs(self, repo):
        branches = self._repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return ({"branches": listed, "tags": [], "converts": []},)

    def resolve(self, repo, revision, path):
        _, sha, files = self._commit(repo, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        content = files[path]
        headers = {"ETag": f'"{_object_id(path, content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not start:
            return content, 200, headers
        first = int(start[1])
        return content[first:], 206, {**headers, "Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.who_am_i),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", lambda handler: ({"errors": [], "warnings": []},)),
    ("PUT", "/blobs/(?P<oid>[0-9a-f]{64})", _Handler.put_blob),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"{_MODEL}/branch/{_REVISION}", _Handler.create_branch),
    ("GET", rf"{_MODEL}/refs", _Handler.refs),
    ("GET", rf"{_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"{_MODEL}(?:/revision/{_REVISION})?", _Handler.info),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", rf"/api/resolve-cache/models/{_REPO}/{_REVISION}/(?P<path>.+)", _Handler.resolve),
)
