"""A small Hugging Face hub on loopback: repositories from folders, revisions, tokens, a storage host, and its bad days.

    with SmallHub() as hub:
        hub.add("Org/Name", folder)              # what HF_ENDPOINT=hub.endpoint then serves
        hub.cut["model.safetensors"] = [1000]    # the first answer breaks off after so many bytes

It answers what huggingface_hub asks: /api/models/ORG/NAME/revision/REV with sizes and hashes, .../tree/REV, and HEAD
and GET of /ORG/NAME/resolve/REV/FILE; the same of datasets. Files over a kilobyte are kept on a storage host (another
port), as on the real hub: the answer is a redirect whose headers carry hash and size. Every request is noted.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenThatIsGood"
SMALL = 1000  # bytes; what is larger lies on the storage host


@dataclass(frozen=True)
class Request:
    """A request as it came.   side: "hub" or "storage"."""

    side: str
    method: str
    path: str
    range: str
    token: str


@dataclass
class Repo:
    """A repository: {revision: {file: content}}.   need: "gated", "private" or nothing."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # branch or tag: commit
    need: str = ""


@dataclass
class SmallHub:
    """Serves while the context lasts."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)  # file: after how many bytes each next answer breaks off
    slow: dict[str, float] = field(default_factory=dict)  # file: seconds for each 4 kB
    spoilt: dict[str, int] = field(default_factory=dict)  # file: how many answers more are of other bytes
    failing: list[int] = field(default_factory=list)  # statuses of the next answers
    deaf: bool = False  # takes no notice of Range
    abrupt: bool = False  # a cut is a reset, not an end
    etag: str = ""  # in place of the files' own
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "SmallHub":
        self._servers = [self._serve("hub"), self._serve("storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *rest: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _serve(self, side: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "side": side})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def add(self, name: str, files: Path | dict[str, bytes], *names: str, need: str = "", kind: str = "models") -> str:
        """Adds a revision of a repository; returns its commit, the newest is main.   names: more branches and tags."""
        content = files if isinstance(files, dict) else {p.name: p.read_bytes() for p in sorted(files.iterdir())}
        commit = hashlib.sha1(repr(sorted((f, hashlib.sha1(c).digest()) for f, c in content.items())).encode())
        repo = self.repos.setdefault(f"{kind}/{name}", Repo())
        repo.revisions[commit.hexdigest()], repo.need = content, need
        repo.names.update(dict.fromkeys(("main", *names), commit.hexdigest()))
        return commit.hexdigest()

    def fetched(self, file: str, method: str = "GET") -> list[Request]:
        """The requests for a file's content, in order."""
        return [r for r in self.requests if r.method == method and r.path.endswith(f"/{file}")]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The variables that lead here and nowhere else."""
        # Agent detection, which belongs to telemetry, asks an address that is fixed when the library is imported.
        fixed = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**fixed, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **more}


def git_hash(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *rest: object) -> None:
        """A client that goes is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    side: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *rest: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        self.hub.requests.append(Request(self.side, self.command, path, self.headers.get("Range", ""), token))
        if self.hub.failing:
            self._refuse(self.hub.failing.pop(0))
        elif self.side == "storage":
            _, kind, org, name, commit, file = path.split("/")
            self._send(self.hub.repos[f"{kind}/{org}/{name}"].revisions[commit][file], file, {})
        elif path.startswith("/api/"):
            self._info(path.removeprefix("/api/"))
        else:
            self._resolve(path.strip("/"))

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": message} if message else {}
        self._reply(status, json.dumps({"error": message or code or "no"}).encode(), headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _open(self, key: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision; None after a refusal in the real hub's words."""
        repo = self.hub.repos.get(key)
        token = self.headers.get("Authorization", "")
        if token not in ("", f"Bearer {TOKEN}"):
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.need == "private" and not token):
            # without a token the real one does not tell a private repository from none
            self._refuse(404, "RepoNotFound", "Repository not found") if token else self._refuse(
                401, "RepoNotFound", "Repository not found"
            )
        elif repo.need == "gated" and not token:
            self._refuse(401, "GatedRepo", "Access to this resource is restricted. Please log in.")
        elif repo.need == "denied":
            self._refuse(403, "GatedRepo", "Access to this resource is restricted and you are not on the list.")
        else:
            begun = [c for c in repo.revisions if len(revision) > 4 and c.startswith(revision)]
            commit = repo.names.get(revision) or next(iter(begun), "")
            if commit:
                return commit, repo.revisions[commit]
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _info(self, path: str) -> None:
        kind, org, name, *rest = path.split("/", 4)
        found = self._open(f"{kind}/{org}/{name}", rest[1] if rest else "main")
        if found is None:
            return
        commit, files = found
        siblings, tree = [], []
        for file, content in files.items():
            size, sha256 = len(content), hashlib.sha256(content).hexdigest()
            blob = git_hash(content if size <= SMALL else b"version https://git-lfs.github.com/spec/v1")
            lfs = {"size": size, "pointerSize": 134}
            siblings.append({"rfilename": file, "size": size, "blobId": blob})
            tree.append({"type": "file", "path": file, "size": size, "oid": blob})
            if size > SMALL:
                siblings[-1]["lfs"], tree[-1]["lfs"] = {**lfs, "sha256": sha256}, {**lfs, "oid": sha256}
        info = {"_id": "1", "id": f"{org}/{name}", "sha": commit, "private": False, "siblings": siblings, "tags": []}
        shown: Any = tree if rest[:1] == ["tree"] else {**info, "downloads": 0, "likes": 0}
        self._reply(200, json.dumps(shown).encode(), {})

    def _resolve(self, path: str) -> None:
        kind = "datasets" if path.startswith("datasets/") else "models"
        org, name, verb, revision, file = path.removeprefix("datasets/").split("/", 4)
        assert verb == "resolve", path
        found = self._open(f"{kind}/{org}/{name}", revision)
        if found is None:
            return
        commit, files = found
        if file not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content, headers = files[file], {"X-Repo-Commit": commit}
        if len(content) > SMALL:
            headers |= {"Location": f"{self.hub.storage}/{kind}/{org}/{name}/{commit}/{file}"}
            etag = self.hub.etag or hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
            self._reply(302, b"", headers)
        else:
            self._send(content, file, {**headers, "ETag": f'"{self.hub.etag or git_hash(content)}"'})

    def _send(self, content: bytes, file: str, headers: dict[str, str]) -> None:
        size, start, status = len(content), 0, 200
        wanted = self.headers.get("Range", "")
        if wanted and not self.hub.deaf:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= size:
                self._reply(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
        if self.command != "HEAD" and self.hub.spoilt.get(file, 0) > 0:
            self.hub.spoilt[file] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(size - start), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cut.get(file)
        end = start + cuts.pop(0) if cuts else size
        try:
            for piece in self._pieces(content[start:end], file):
                self.wfile.write(piece)
        except OSError:  # the client has gone
            self.close_connection = True
        if end < size:
            self.close_connection = True
            if self.hub.abrupt:
                time.sleep(0.2)  # so that what was sent arrives
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def _pieces(self, content: bytes, file: str) -> Iterator[bytes]:
        pause = self.hub.slow.get(file, 0.0)
        step = 4096 if pause else max(1, len(content))
        for at in range(0, len(content), step):
            yield content[at : at + step]
            time.sleep(pause)
