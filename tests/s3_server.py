"""An S3 server on loopback, whose answers a test can spoil."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Callable

import pytest

ERRORS = {403: ("403 Forbidden", "AccessDenied"), 503: ("503 Service Unavailable", "SlowDown")}
RESET = "reset"


class S3Server:
    """A bucket of a real HTTP server (moto's). The environment of this process and its children points to it.

    `fault` is called with "METHOD /path" of every request. It may return an HTTP status of ERRORS, or RESET, which
    replaces the answer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moto = pytest.importorskip("moto.server", reason="needs moto[server]")
        pytest.importorskip("s3fs")
        boto3 = pytest.importorskip("boto3")
        from werkzeug.serving import make_server

        self.fault: Callable[[str], int | str | None] = lambda request: None
        self.requests: list[str] = []
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self._server.port}")
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # for one of three libraries that retry
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self._server.port}")
        reset = urllib.request.Request(f"http://127.0.0.1:{self._server.port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # moto keeps its buckets until the process ends
        self.client.create_bucket(Bucket="bucket")

    def close(self) -> None:
        self._server.shutdown()
        self.client.close()

    def keys(self, prefix: str = "") -> list[str]:
        listed = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket="bucket", Key=key)["Body"].read()

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def whole(self, run: str) -> list[str]:
        """The names of a run's copies that have a manifest."""
        return [m[1] for key in self.keys(f"{run}/") if (m := re.search(r"/(step_\d+)/manifest\.json$", key))]

    def _answer(self, environ: dict, start_response: Callable) -> list[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.requests.append(request)
        fault = self.fault(request)
        if fault is None:
            return self._app(environ, start_response)
        if fault == RESET:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        status, code = ERRORS[int(fault)]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(status, [("Content-Type", "application/xml")])
        if environ["REQUEST_METHOD"] == "HEAD":  # its answer has no body; clients may report one as an error
            return []
        return [f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()]
