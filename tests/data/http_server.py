"""A real HTTP server on loopback that fails as told: the n-th request of a path does what its script says."""

from __future__ import annotations

import gzip
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DO_IT_RIGHT = "serve"


class FaultyServer:
    """Serves `files`, compressed if `encoding` is gzip. `faults[path]` lists a fault for each request; later requests
    are served.

    serve · 503 · stall (half, then nothing) · truncate (half, then the connection is closed) · unsized (half, without a
    Content-Length) · reset (half, then RST) · wrong (other bytes) · die (half, then the server stops until `start`)
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.encoding = ""  # the header Content-Encoding
        self.retry_after = ""  # the header Retry-After of 503
        self.faults: defaultdict[str, Iterator[str]] = defaultdict(lambda: iter(()))
        self.requests: Counter[str] = Counter()
        self.credentials: set[str | None] = set()  # the headers Authorization
        self.half_sent, self.dead, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._held = socket.socket()  # no other process gets the port while the server is stopped
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self._port = self._held.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def fail(self, path: str, faults: Iterable[str]) -> None:
        self.faults[path] = iter(faults)

    def start(self) -> None:
        """Start, or restart on the same port."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.dead.clear()
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._die()

    def close(self) -> None:
        self.stop()
        self._held.close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        with self._lock:
            self.requests[path] += 1
            self.credentials.add(request.headers.get("Authorization"))
            fault = next(self.faults[path], DO_IT_RIGHT)
        content = self.files.get(path)
        if content is None:
            request.send_error(404)
            return
        if fault == "503":
            request.send_response(503)
            if self.retry_after:
                request.send_header("Retry-After", self.retry_after)
            request.end_headers()
            return
        request.send_response(200)
        if self.encoding:
            request.send_header("Content-Encoding", self.encoding)
        if self.encoding == "gzip":
            content = gzip.compress(content)
        if fault != "unsized":
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if fault in (DO_IT_RIGHT, "wrong"):
            request.wfile.write(content if fault == DO_IT_RIGHT else content[::-1])
            return
        request.wfile.write(content[: len(content) // 2])
        self.half_sent.set()
        if fault == "stall":
            self._stopping.wait()
        elif fault in ("reset", "die"):
            # with an SO_LINGER of 0 s, closing resets the connection
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault == "die":
                self._die()
            request.connection.close()

    def _die(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self.dead.set()
