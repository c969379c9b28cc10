"""Serve enough of a Hugging Face Hub, in memory, for the real client to push and load models."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.support.hub.faults import Fault, Server
from tests.support.hub.repos import Repo, is_large, oid

__all__ = ["HubServer"]

_FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_")  # settings of whoever runs the tests
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"


class Reply(NamedTuple):
    status: int
    content: Any = None
    headers: Mapping[str, str] = {}


class _RefusalError(Exception):
    """End a request with an error that the client turns into its own exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(status, {"error": message}, named | headers)


class HubServer:
    """The server; a context manager that runs it in a thread.

    Attributes:
        token: The one token that is valid; needed to write, and to read private repositories.
        user: Whose token it is: the namespace of repositories created without one.
        repos: Repositories by id.
        requests: Method and path of every request so far.
        url: Its address, for `HF_ENDPOINT`.
        faults: What goes wrong; see `faulty`.
    """

    def __init__(self, token: str = "hf_loopback", user: str = "me") -> None:
        self.token = token
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._blobs: dict[str, bytes] = {}
        self._lock = Lock()
        self._server = Server(("127.0.0.1", 0), _handler(self))
        self._thread = Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> HubServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client_environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """Return the environment of a process whose client is logged in to this server and keeps its cache in `home`.

        It is that of this process, without its settings of huggingface_hub and transformers; huggingface_hub reads
        them when it is imported, so it takes a new process.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        settings = dict(HF_ENDPOINT=self.url, HF_HOME=os.fspath(home), HF_TOKEN=self.token, HF_HUB_OFFLINE="0")
        settings |= dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1")
        return inherited | settings

    @contextmanager
    def faulty(self, *faults: Fault) -> Iterator[None]:
        """Let these faults happen within this context; a request meets the first that is for it."""
        self.faults += faults
        try:
            yield
        finally:
            for fault in faults:
                self.faults.remove(fault)
                fault.release()

    def fault_of(self, method: str, path: str) -> Fault | None:
        """Return the fault that this request meets."""
        with self._lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)

    @property
    def downloads(self) -> list[str]:
        """Return the name of every file whose content was sent, in order."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> Reply:
        """Return the reply to one request."""
        with self._lock:
            self.requests.append((method, path))
            try:
                if authorization not in (None, f"Bearer {self.token}"):
                    raise _RefusalError(401, "Invalid credentials in Authorization header")
                for methods, pattern, answer in _ROUTES:
                    if method in methods and (match := re.fullmatch(pattern, path)):
                        if method == "POST" and authorization is None:
                            raise _RefusalError(401, "Log in to write")
                        parts = {name: unquote(part) for name, part in match.groupdict().items()}
                        if "repo" in parts:
                            parts["repo"] = self._readable(parts["repo"], authorization)
                        return answer(self, body, **parts)
                raise _RefusalError(404, f"This imitation of the Hub has no {method} {path}")
            except _RefusalError as refused:
                return refused.reply

    def _readable(self, name: str, authorization: str | None) -> str:
        repo = self.repos.get(name)
        if repo is None or (repo.private and authorization is None):  # like the Hub, do not tell which of the two
            raise _RefusalError(404 if authorization else 401, "Repository not found", "RepoNotFound")
        return name

    def _sha(self, repo: str, revision: str) -> str:
        sha = self.repos[repo].resolve(revision)
        if sha is None:
            raise _RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def _create(self, body: bytes) -> Reply:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        url = f"{self.url}/{name}"
        if not name.startswith(f"{self.user}/"):
            raise _RefusalError(403, f"You have no rights in the namespace of {name}")
        if name in self.repos:
            return Reply(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True  # of earlier clients
        self.repos[name] = Repo(private=private)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return Reply(200, {"url": url, "name": name})

    def _validate_card(self, body: bytes) -> Reply:
        if json.loads(body)["content"].startswith("---\n"):
            return Reply(200, {"errors": [], "warnings": []})
        return Reply(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def _preupload(self, body: bytes, repo: str, revision: str) -> Reply:
        present = self.repos[repo].commits[self._sha(repo, revision)]
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in present:
                files[-1]["oid"] = oid(path, present[path])
        return Reply(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> Reply:
        objects = []
        for wanted in json.loads(body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self._blobs:
                upload, verify = (f"{self.url}{path}/{wanted['oid']}" for path in ("/upload", f"/{repo}/verify"))
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return Reply(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, digest: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != digest:
            raise _RefusalError(400, "Content does not match its hash")
        self._blobs[digest] = body
        return Reply(200)

    def _verify(self, body: bytes, repo: str, digest: str) -> Reply:
        if len(self._blobs.get(digest, b"")) != json.loads(body)["size"]:
            raise _RefusalError(404, "No such object")
        return Reply(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> Reply:
        self._sha(repo, revision)
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in body.splitlines():
            value, kind = json.loads(line)["value"], json.loads(line)["key"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                changes[value["path"]] = self._blobs[value["oid"]]
            elif kind == "deletedFile":
                changes[value["path"]] = None
        sha = self.repos[repo].commit(changes, revision, message)
        return Reply(200, {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> Reply:
        sha = self._sha(repo, revision)
        siblings = [{"rfilename": path} for path in self.repos[repo].commits[sha]]
        private = self.repos[repo].private
        return Reply(200, {"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, body: bytes, repo: str, revision: str) -> Reply:
        entries: list[dict[str, Any]] = []
        for path, content in self.repos[repo].commits[self._sha(repo, revision)].items():
            entries.append({"type": "file", "path": path, "size": len(content), "oid": oid(path, content)})
            if is_large(path):
                entries[-1]["lfs"] = {"oid": oid(path, content), "size": len(content), "pointerSize": 130}
        return Reply(200, entries)

    def _file(self, body: bytes, repo: str, revision: str, path: str) -> Reply:
        sha = self._sha(repo, revision)
        content = self.repos[repo].commits[sha].get(path)
        if content is None:
            raise _RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        etag = f'"{oid(path, content)}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag}
        if is_large(path):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        return Reply(200, content, headers)

    def _tag(self, body: bytes, repo: str, revision: str) -> Reply:
        return self._name(self.repos[repo].tags, json.loads(body)["tag"], self._sha(repo, revision))

    def _branch(self, body: bytes, repo: str, name: str) -> Reply:
        return self._name(
            self.repos[repo].branches, name, self._sha(repo, json.loads(body).get("startingPoint", "main"))
        )

    def _name(self, names: dict[str, str], name: str, sha: str) -> Reply:
        if name in names:
            raise _RefusalError(409, f"{name} exists already")
        names[name] = sha
        return Reply(200)


_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Reply]]] = [
    (("POST",), r"/api/repos/create", HubServer._create),
    (("POST",), r"/api/validate-yaml", HubServer._validate_card),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", HubServer._preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer._batch),
    (("PUT",), r"/upload/(?P<digest>[0-9a-f]+)", HubServer._put),
    (("POST",), rf"/{_REPO}/verify/(?P<digest>[0-9a-f]+)", HubServer._verify),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", HubServer._commit),
    (("POST",), rf"/api/models/{_REPO}/tag/{_REVISION}", HubServer._tag),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<name>[^/]+)", HubServer._branch),
    (("GET",), rf"/api/models/{_REPO}", HubServer._info),
    (("GET",), rf"/api/models/{_REPO}/revision/{_REVISION}", HubServer._info),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}", HubServer._tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", HubServer._file),
]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            path = urlsplit(self.path).path
            length = int(self.headers.get("Content-Length", 0))
            fault = hub.fault_of(self.command, path)
            if fault is not None:
                fault.read(self, length)
                if self.command == "GET":
                    self.reply(path, b"", fault.write)
                fault.end(self)
                return
            self.reply(path, self.rfile.read(length), lambda handler, content: handler.wfile.write(content))

        def reply(self, path: str, body: bytes, write: Callable[[BaseHTTPRequestHandler, bytes], object]) -> None:
            reply = hub.answer(self.command, path, self.headers.get("Authorization"), body)
            content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                write(self, content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
