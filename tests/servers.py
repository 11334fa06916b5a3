"""Local HTTP servers for tests: one that can fail in every way, and one in GitHub's shape."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from chestxray_covid.datasets.download import GitHubEndpoints, download_cohen


@dataclass(frozen=True)
class Request:
    """What a client asked for; ``number`` counts the same method and path from 1."""

    path: str
    headers: Mapping[str, str]
    number: int
    time_s: float
    method: str = "GET"
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server does.

    Attributes:
        status: HTTP status of a reply to a whole file.
        body: The body, as it should be.
        headers: Further headers; ``Content-Length`` here may lie.
        ranges: Whether ``Range`` is honoured, with 206 or 416.
        cut_after: The connection is closed after so many bytes of the body.
        chunked: Send the body in chunks, without a length.
        pause_s: Pause after every 16 KiB.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True
    cut_after: int | None = None
    chunked: bool = False
    pause_s: float = 0.0


class LocalServer:
    """An HTTP server on 127.0.0.1 that answers with what a function says.

    Args:
        answer: Request → reply; ``None`` is a 404.
        certificate: PEM file with key and certificate; makes it an https server.

    Attributes:
        url: Base URL.
        requests: All requests so far, in order.
        sent: Path → bytes of bodies that were sent.
    """

    def __init__(
        self, answer: Callable[[Request], Reply | None], certificate: str | None = None
    ) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, path: str, method: str = "GET") -> int:
        """Return how often a path was asked for."""
        return sum((r.method, r.path) == (method, path) for r in self.requests)

    def receive(
        self, path: str, headers: Mapping[str, str], method: str = "GET", body: bytes = b""
    ) -> Reply:
        with self._lock:
            number = self.count(path, method) + 1
            request = Request(path, dict(headers), number, time.monotonic(), method, body)
            self.requests.append(request)
        return self.answer(request) or Reply(status=404, body=b"404: Not Found")

    def note_sent(self, path: str, count: int) -> None:
        with self._lock:
            self.sent[path] += count


class GitHubServer(LocalServer):
    """A repository as GitHub serves it: commits, trees and raw files.

    Args:
        files: Path → content.
        entries: Further entries of the tree, as JSON.

    Attributes:
        files: The content of the commit; see :meth:`publish`.
        commit: Its name.
        faults: Path (of the repository, or ``"commit"``, ``"tree"``) → function of the request
            and the right reply, that returns what is sent instead.
    """

    owner, repo = "owner", "covid-data"

    def __init__(self, files: Mapping[str, bytes], entries: Iterable[Any] = ()) -> None:
        super().__init__(self._answer)
        self.entries = list(entries)
        self.truncated = False
        self.faults: dict[str, Callable[[Request, Reply], Reply | None]] = {}
        self.publish(files)

    def publish(self, files: Mapping[str, bytes]) -> None:
        """Make a new commit with these files."""
        self.files = dict(files)
        folders = {path.rpartition("/")[0] for path in self.files} - {""}
        self.tree: list[dict[str, Any]] = [
            {"path": f, "mode": "040000", "type": "tree", "sha": "0" * 40} for f in folders
        ]
        for path, data in self.files.items():
            blob = {"mode": "100644", "type": "blob", "sha": git_blob_sha1(data)}
            self.tree.append({"path": path, "size": len(data), **blob})
        self.commit = hashlib.sha1(json.dumps(self.tree).encode()).hexdigest()

    @property
    def endpoints(self) -> GitHubEndpoints:
        return GitHubEndpoints(
            api=f"{self.url}/api", raw=f"{self.url}/raw", owner=self.owner, repo=self.repo
        )

    def raw_path(self, path: str) -> str:
        return f"/raw/{self.owner}/{self.repo}/{self.commit}/{path}"

    def fetched(self) -> Counter[str]:
        """Return path of the repository → number of requests."""
        prefix = self.raw_path("")
        paths = [r.path.removeprefix(prefix) for r in self.requests if r.path.startswith(prefix)]
        return Counter(paths)

    def _answer(self, request: Request) -> Reply | None:
        api = f"/api/repos/{self.owner}/{self.repo}"
        if request.path == f"{api}/commits/master":
            name, reply = "commit", _json({"sha": self.commit, "files": []})
        elif request.path == f"{api}/git/trees/{self.commit}?recursive=1":
            name = "tree"
            reply = _json({"tree": [*self.tree, *self.entries], "truncated": self.truncated})
        elif (path := request.path.removeprefix(self.raw_path(""))) in self.files:
            name, reply = path, Reply(body=self.files[path])
        else:
            return None
        fault = self.faults.get(name)
        return fault(request, reply) if fault else reply


def git_blob_sha1(data: bytes) -> str:
    """Return what ``git hash-object`` prints."""
    return hashlib.sha1(b"blob " + str(len(data)).encode() + b"\0" + data).hexdigest()


def forkserver() -> ForkServerContext:
    """Return a context whose processes start in milliseconds and may be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "chestxray_covid.datasets.download"])
    return context


def download_without_locks(root: Path, options: dict[str, Any]) -> None:
    """Download where locks exclude nobody, as on some network file systems."""
    fcntl.flock = lambda handle, operation: None
    download_cohen(root, **options)


def _json(data: Any) -> Reply:
    return Reply(body=json.dumps(data).encode(), headers={"Content-Type": "application/json"})


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients here are killed, and give up, on purpose."""


def _handler(server: LocalServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 60

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = unquote(self.path)
            given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = server.receive(path, dict(self.headers), self.command, given)
            status, body, headers = _ranged(reply, self.headers.get("Range"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if reply.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(path, reply, body)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - http.server calls them

        def _send_body(self, path: str, reply: Reply, body: bytes) -> None:
            end = len(body) if reply.cut_after is None else min(reply.cut_after, len(body))
            for start in range(0, end, 16_384):
                piece = body[start : min(end, start + 16_384)]
                if reply.chunked:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                else:
                    self.wfile.write(piece)
                server.note_sent(path, len(piece))
                if reply.pause_s:
                    time.sleep(reply.pause_s)
            if end < len(body) or "Content-Length" in reply.headers:
                self.close_connection = True
            elif reply.chunked:
                self.wfile.write(b"0\r\n\r\n")

    return Handler


def _ranged(reply: Reply, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
    headers = dict(reply.headers)
    match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
    if reply.status != 200 or not reply.ranges or match is None:
        return reply.status, reply.body, headers
    start, size = int(match[1]), len(reply.body)
    if start >= size:
        return 416, b"", {"Content-Range": f"bytes */{size}"}
    headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    return 206, reply.body[start:], headers
