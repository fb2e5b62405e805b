"""A small Hugging Face hub: its file API as huggingface_hub asks for it, a record of what was asked and sent, and
faults on request."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 4_096
TOKEN = "hf_the_right_one"
"""What opens a gated repository."""


@dataclass
class Repo:
    """A repository with one commit."""

    hub_id: str
    files: dict[str, bytes]
    gated: bool = False
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the hub names instead of the right ones."""

    @property
    def commit(self) -> str:
        """A commit hash that belongs to the content."""
        return hashlib.sha1(
            "".join(f"{name} {_git_sha1(content)}" for name, content in self.files.items()).encode()
        ).hexdigest()

    def is_lfs(self, name: str) -> bool:
        """Return whether the hub keeps the file in LFS, as it does all weights."""
        return name.endswith((".safetensors", ".bin", ".h5", ".msgpack"))

    def sibling(self, name: str) -> dict[str, Any]:
        """What the API says of a file."""
        content = self.files[name]
        size = self.claimed_sizes.get(name, len(content))
        if not self.is_lfs(name):
            return {"rfilename": name, "size": size, "blobId": _git_sha1(content)}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize {size}\n".encode()
        lfs = {"sha256": _sha256(content), "size": size, "pointerSize": len(pointer)}
        return {"rfilename": name, "size": size, "blobId": _git_sha1(pointer), "lfs": lfs}


@dataclass
class Asked:
    """A request that came, and how much of a body went out."""

    method: str
    name: str
    """Name of a file, or the path of an API call."""
    range: str | None
    authorization: str | None
    sent: int = 0


class HubServer:
    """Serves repositories at `url` until it is closed."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.cut_after: dict[str, list[int]] = {}
        """Bytes after which the next transfers of a file break off, one number for each."""
        self.always_cut_after: dict[str, int] = {}
        """Bytes of the whole file after which every transfer of it breaks off."""
        self.hold_after: dict[str, int] = {}
        """Bytes after which the next transfer of a file stands still until `release` is set or the client is gone."""
        self.release = threading.Event()
        self.flipped: dict[str, int] = {}
        """How many of the next transfers of a file have a wrong byte."""
        self.failures: list[int] = []
        """Statuses to answer the next requests with."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self)

            def do_HEAD(self) -> None:
                server._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT should be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, hub_id: str, folder: Path, **options: Any) -> Repo:
        """Serve the files of a folder as a repository."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        repo = self.repos[hub_id] = Repo(hub_id, files, **options)
        return repo

    def transfers(self, name: str) -> list[Asked]:
        """Requests for a file that sent bytes of it, in order."""
        return [asked for asked in self.asked if asked.name == name and asked.sent]

    def fetched(self) -> list[str]:
        """Names of the files that bytes were sent of, each once."""
        return sorted({asked.name for asked in self.asked if asked.sent})

    def close(self) -> None:
        """Stop serving; connections are refused from now on."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        path = unquote(address.path)
        if path == "/api/agent-harnesses":
            return _send(request, 404)  # what huggingface_hub asks for its user agent, once a process
        asked = Asked(request.command, path, request.headers.get("Range"), request.headers.get("Authorization"))
        self.asked.append(asked)
        if self.failures:
            return _send(request, self.failures.pop(0))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        content = re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)", path)
        if api:
            self._answer_api(request, api[1], api[2], api[3] or "main", "blobs" in parse_qs(address.query))
        elif file:
            asked.name = file[3]
            self._answer_file(request, file[1], file[2], file[3], asked)
        elif content:
            asked.name = content[2]
            self._send_content(request, self.repos[content[1]].files[content[2]], asked, {})
        else:
            _send(request, 404)
        return None

    def _answer_api(
        self, request: BaseHTTPRequestHandler, hub_id: str, what: str | None, revision: str, blobs: bool
    ) -> None:
        repo = self._repo(request, hub_id, revision)
        if repo is None:
            return None
        if what == "tree":
            siblings = [repo.sibling(name) for name in repo.files]
            entries = [_tree_entry(sibling) for sibling in siblings]
            return _send(request, 200, {}, json.dumps(entries).encode())
        siblings = [repo.sibling(name) if blobs else {"rfilename": name} for name in repo.files]
        info = {"id": hub_id, "modelId": hub_id, "sha": repo.commit, "private": False, "siblings": siblings}
        return _send(request, 200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _repo(self, request: BaseHTTPRequestHandler, hub_id: str, revision: str) -> Repo | None:
        """Return the repository, or answer that there is none."""
        repo = self.repos.get(hub_id)
        if repo is None:
            _send(request, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in ("main", repo.commit):
            _send(request, 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            repo = None
        return repo

    def _answer_file(
        self, request: BaseHTTPRequestHandler, hub_id: str, revision: str, name: str, asked: Asked
    ) -> None:
        repo = self._repo(request, hub_id, revision)
        if repo is None:
            return None
        if repo.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _send(
                request, 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
            )
        headers = {"X-Repo-Commit": repo.commit}
        if name not in repo.files:
            return _send(
                request, 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        content = repo.files[name]
        if repo.is_lfs(name):
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host, as the hub's store of large files is
            return _send(request, 302, headers | {"Location": f"{elsewhere}/cdn/{hub_id}/{name}"})
        return self._send_content(request, content, asked, headers | {"ETag": f'"{_git_sha1(content)}"'})

    def _send_content(
        self, request: BaseHTTPRequestHandler, content: bytes, asked: Asked, headers: dict[str, str]
    ) -> None:
        start = 0
        if asked.range:
            match = re.fullmatch(r"bytes=(\d+)-", asked.range)
            assert match, asked.range
            start = int(match[1])
            if start >= len(content):
                return _send(request, 416)
        if request.command == "GET" and self.flipped.get(asked.name, 0):
            self.flipped[asked.name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        request.send_response(206 if asked.range else 200)
        if asked.range:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        for key, value in (headers | {"Content-Length": str(len(content) - start)}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            with suppress(ConnectionError):  # a client that was killed
                self._send_pieces(request, content, start, asked)
        return None

    def _send_pieces(self, request: BaseHTTPRequestHandler, content: bytes, start: int, asked: Asked) -> None:
        stop = min(
            start + self._next_cut(asked.name), self.always_cut_after.get(asked.name, len(content)), len(content)
        )
        hold = self.hold_after.pop(asked.name, None)
        for first, last in _pieces(start, stop, start + hold if hold is not None else None):
            if hold is not None and first == start + hold:
                request.wfile.flush()
                self.release.wait(60)
            request.wfile.write(content[first:last])
            asked.sent += last - first
        if stop < len(content):
            request.close_connection = True

    def _next_cut(self, name: str) -> int:
        cuts = self.cut_after.get(name)
        return cuts.pop(0) if cuts else 1 << 62


def _pieces(start: int, stop: int, border: int | None) -> Iterator[tuple[int, int]]:
    """Cut a range into chunks, with a border where one is asked for: 0 to 10,000 with 5,000 is 0-4096, 4096-5000,
    5000-9096, ..."""
    first = start
    while first < stop:
        last = min(first + CHUNK, stop)
        if border is not None and first < border < last:
            last = border
        yield first, last
        first = last


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None, body: bytes = b""
) -> None:
    request.send_response(status)
    for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _tree_entry(sibling: dict[str, Any]) -> dict[str, Any]:
    entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
    if "lfs" in sibling:
        lfs = sibling["lfs"]
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
