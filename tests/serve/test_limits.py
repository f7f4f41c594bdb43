"""Requests that are too large, too many, too slow, malformed or hostile; the server answers each and continues."""

from __future__ import annotations

import io
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.serve import client
from tests.serve.client import httpx
from tests.serve.conftest import LIMIT_S, Server

pytest.importorskip("fastapi")

BOUNDARY = b"frontier"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
PART = b'--frontier\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc\r\n'
END = b"--frontier--\r\n"


@pytest.fixture(scope="module")
def small(finished_run: Path) -> Iterator[Server]:
    limits = ("--max-file-bytes", "2000", "--max-request-bytes", "8000", "--max-files", "3", "--max-requests", "1")
    started = Server(finished_run, "--port", "0", "--timeout", str(LIMIT_S), *limits)
    yield started
    assert started.stop() == (0, "")


@pytest.fixture
def url(small: Server) -> Iterator[str]:
    yield small.url
    answered = client.post(f"{small.url}/predict", files=[("files", b"still there")])
    assert answered.status_code == 200
    assert "bfsys_requests_in_progress 0.0" in client.get(f"{small.url}/metrics").text


def refused(url: str, status: int, content: bytes, headers: dict = FORM) -> str:
    answered = client.post(f"{url}/predict", content=content, headers=headers)
    assert answered.status_code == status, answered.text
    return answered.json()["detail"]


def test_files_and_requests_above_a_limit_are_refused(url: str) -> None:
    def status(*lengths: int) -> int:
        files = [("files", (f"{n}", bytes(length))) for n, length in enumerate(lengths)]
        return client.post(f"{url}/predict", files=files).status_code

    assert status(400, 400, 400) == 200
    assert status(2001) == 413
    assert status(1, 1, 1, 1) == 413
    assert status(2000, 2000, 2000) == 422  # within the request limit, but above the model limit
    assert "more than 3 files" in refused(url, 413, PART * 20 + END)
    assert "larger than 8,000 bytes" in refused(url, 413, PART * 10_000 + END)


def test_a_body_without_a_length_is_refused_while_it_arrives(small: Server, url: str) -> None:
    """The file is endless, so refused bytes must not be stored."""
    process = psutil.Process(small.process.pid)
    before = process.memory_info().rss
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield PART[:-5]
        while sent < 200_000_000:
            sent += 100_000
            yield bytes(100_000)

    try:
        answered = client.post(f"{url}/predict", content=endless(), headers=FORM)
        assert answered.status_code == 413
    except httpx.TransportError:
        pass  # the server may close the connection instead of reading on
    assert process.memory_info().rss - before < 50_000_000


def test_bodies_of_another_kind(url: str) -> None:
    assert "must be multipart/form-data" in refused(url, 415, b"{}", {"content-type": "application/json"})
    assert "must be multipart/form-data" in refused(url, 415, b"abc", {})
    assert "Content-Encoding" in refused(url, 415, PART + END, FORM | {"content-encoding": "gzip"})
    assert "needs a boundary" in refused(url, 422, PART + END, {"content-type": "multipart/form-data"})
    assert "not a valid" in refused(url, 422, PART, {"content-type": f"multipart/form-data; boundary={'x' * 300}"})
    assert "cut short" in refused(url, 422, PART)
    assert "cut short" in refused(url, 422, b"")
    assert "not a valid" in refused(url, 422, b"\0" * 100)
    assert "no file" in refused(url, 422, END)
    assert "field named 'file'" in refused(url, 422, PART.replace(b'"files"', b'"file"') + END)
    encoded = PART.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1)
    assert "Content-Transfer-Encoding: got 'base64'" in refused(url, 415, encoded + END)
    assert "field named ''" in refused(url, 422, b"--frontier\r\n\r\nabc\r\n" + END)


def test_random_bodies(url: str) -> None:
    """A damaged body gets an answer or a refusal, and never causes a crash."""
    rng = np.random.default_rng(0)
    good = np.frombuffer(PART + PART + END, np.uint8)
    with httpx.Client(timeout=LIMIT_S) as session:
        for _ in range(150):
            body = good.copy()
            places = rng.integers(0, len(body), 4)
            body[places] = rng.choice(np.frombuffer(b'\r\n-:;="\0\xff a', np.uint8), 4)
            cut = body[: rng.integers(1, len(body) + 1)].tobytes()
            answered = session.post(f"{url}/predict", content=cut, headers=FORM)
            assert answered.status_code in (200, 422), answered.text


def test_archives_stay_bytes(url: str) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(300_000))
    assert len(held.getvalue()) < 500
    assert client.post(f"{url}/predict", files=[("files", held.getvalue())]).status_code == 200


def test_names_that_are_hostile(url: str) -> None:
    """The service returns them as data, and does not interpret them."""
    for name in ("../../etc/passwd", "<script>alert(1)</script>", "ü\u202e", "x" * 1000):
        answered = client.post(f"{url}/predict", files=[("files", (name, b"abc"))])
        assert answered.json()["answers"][0]["name"] == name
        assert answered.headers["content-type"] == "application/json"
        page = client.post(f"{url}/explain", files=[("files", (name, b"abcdefgh"))], headers={"accept": "text/html"})
        assert page.status_code in (200, 503)
        assert "<script" not in page.text
        if page.status_code == 200:
            assert page.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_names_in_the_form_of_rfc_5987(url: str) -> None:
    for header, name in (
        (b"filename*=UTF-8''%e2%82%ac.png", "€.png"),
        (b"filename=\"e.png\"; filename*=utf-8'en'%e2%82%ac.png", "€.png"),
        (b"filename*=iso-8859-1''%a3.png", "£.png"),
    ):
        body = b'--frontier\r\nContent-Disposition: form-data; name="files"; ' + header + b"\r\n\r\nabc\r\n" + END
        answered = client.post(f"{url}/predict", content=body, headers=FORM)
        assert answered.json()["answers"][0]["name"] == name


def raw(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), LIMIT_S)


def head(length: int) -> bytes:
    headers = (f"{name}: {value}" for name, value in (FORM | {"Host": "localhost", "Content-Length": length}).items())
    return "\r\n".join(("POST /predict HTTP/1.1", *headers, "", "")).encode()


def test_a_slow_client_keeps_its_place_until_it_disconnects(url: str) -> None:
    with raw(url) as slow:
        slow.sendall(head(1000) + PART)
        while "bfsys_requests_in_progress 1.0" not in client.get(f"{url}/metrics").text:
            time.sleep(0.005)
        busy = client.post(f"{url}/predict", files=[("files", b"abc")])
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "2")
    while "bfsys_requests_in_progress 1.0" in client.get(f"{url}/metrics").text:
        time.sleep(0.005)
    assert 'path="/predict",status="499"' in client.get(f"{url}/metrics").text


def test_a_request_that_does_not_arrive_in_time_is_refused(finished_run: Path, start: Callable[..., Server]) -> None:
    server = start(finished_run, "--port", "0", "--timeout", "0.5")
    with raw(server.url) as slow:
        slow.sendall(head(1000) + PART)
        assert slow.recv(10_000).startswith(b"HTTP/1.1 408 ")
    assert "bfsys_requests_in_progress 0.0" in client.get(f"{server.url}/metrics").text


def test_wrong_lengths_and_no_http(url: str) -> None:
    for sent, expected in (
        (head(len(PART) - 4) + PART + END, b"HTTP/1.1 422 "),  # the body ends before the form does
        (head(-1) + PART, b"HTTP/1.1 400 "),
        (b"\x16\x03\x01 no HTTP\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /" + b"x" * 100_000, b"HTTP/1.1 400 "),
    ):
        with raw(url) as connection:
            with suppress(ConnectionError):  # it may have answered and closed before everything is sent
                connection.sendall(sent)
            assert connection.recv(10_000).startswith(expected)


def test_a_request_for_a_whole_url(url: str) -> None:
    """RFC 9112 requires servers to accept it; its host counts, not the one in the header."""
    own = url.removeprefix("http://")
    for target, host, expected in (
        (f"{url}/health", own, b"HTTP/1.1 200 "),
        (f"HTTP://{own}", own, b"HTTP/1.1 200 "),
        (f"{url}/health", "elsewhere.example", b"HTTP/1.1 200 "),
        ("http://elsewhere.example/health", own, b"HTTP/1.1 400 "),
        (f"{url}/nothing", own, b"HTTP/1.1 404 "),
    ):
        with raw(url) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert connection.recv(10_000).startswith(expected), (target, host)
