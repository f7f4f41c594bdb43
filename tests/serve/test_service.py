"""Answers of a real server: to many clients at once, while it stops, and without a trace on the disk."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import bfsys
from bfsys.serve.listener import bind
from tests.conftest import REPOSITORY
from tests.serve import client
from tests.serve.client import httpx
from tests.serve.conftest import Server

pytest.importorskip("fastapi")


def post(url: str, contents: list[bytes], **query: str | int) -> httpx.Response:
    files = [("files", (f"{n}.bin", content)) for n, content in enumerate(contents)]
    return client.post(f"{url}/predict", params=query, files=files)


@pytest.mark.filterwarnings("ignore:.*out-of-distribution score")
def test_concurrent_answers_are_those_of_the_model(server: Server, finished_run: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [[rng.bytes(int(n)) for n in rng.integers(1, 400, 1 + k % 4)] for k in range(40)]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda contents: post(server.url, contents, top=9), requests))
    model = bfsys.load(finished_run)
    for contents, response in zip(requests, responses, strict=True):
        assert response.status_code == 200
        answers = response.json()["answers"]
        assert [answer["name"] for answer in answers] == [f"{n}.bin" for n in range(len(contents))]
        for answer, wanted in zip(answers, model.predict(contents, top=9), strict=True):
            got = {one["class"]: one["probability"] for one in answer["top"]}
            assert got == pytest.approx({one.class_name: one.probability for one in wanted}, abs=1e-5)
            assert [one["index"] for one in answer["top"]] == [model.classes.index(name) for name in got]


def test_a_bad_file_fails_alone(server: Server) -> None:
    answered = post(server.url, [b"good", b"", bytes(2_000), b"good"])
    assert answered.status_code == 200
    first, empty, long, last = answered.json()["answers"]
    assert first["top"] == last["top"]
    assert empty == {"name": "1.bin", "error": "empty; there is nothing to classify"}
    assert long["error"] == "the model would read 2,000 bytes of it; 500 are allowed"
    refused = post(server.url, [b"", b""])
    assert refused.status_code == 422
    assert [sorted(answer) for answer in refused.json()["answers"]] == [["error", "name"]] * 2
    assert post(server.url, [b"x"], encode="true").json()["detail"].startswith("encode: ")
    assert post(server.url, [b"x"], top=0).json()["detail"].startswith("top: ")


def test_arguments_that_would_be_ignored_are_refused(server: Server) -> None:
    unknown = post(server.url, [b"x"], tpo="1")
    assert (unknown.status_code, unknown.json()["detail"]) == (
        422, "tpo: is not an argument of /predict; allowed are top, encode (did you mean 'top'?)",
    )  # fmt: skip
    twice = client.post(f"{server.url}/predict?top=1&top=2", files=[("files", b"x")])
    assert (twice.status_code, twice.json()["detail"]) == (422, "top: is given 2 times; once is allowed")
    assert client.post(f"{server.url}/explain?top=1", files=[("files", b"x")]).status_code == 422


def test_probes_may_use_head(server: Server) -> None:
    for path in ("/health", "/"):
        answered = client.head(server.url + path)
        assert (answered.status_code, answered.content) == (200, b"")


def test_health_model_and_metrics_describe_the_service(server: Server) -> None:
    health = client.get(f"{server.url}/health").json()
    assert health == {"status": "ready", "step": 120, "device": "cpu"}
    model = client.get(f"{server.url}/model").json()
    assert (model["classes"], model["limits"]["model_bytes"]) == (["a0", "a1", "a2", "b0", "b1"], 500)
    post(server.url, [b"abc", b"defg"])
    lines = client.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['bfsys_requests_total{path="/predict",status="200"}']) >= 1
    assert float(values["bfsys_files_total"]) >= 2
    assert float(values["bfsys_batch_files_count"]) >= 1
    assert values["bfsys_requests_in_progress"] == "0.0"


def test_other_sites_and_other_names_are_refused(server: Server) -> None:
    def status(method: str, **headers: str) -> int:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.request(method, f"{server.url}/predict", headers=names).status_code

    own = server.url.removeprefix("http://")
    assert status("POST", sec_fetch_site="cross-site") == 403
    assert status("POST", sec_fetch_site="same-site") == 403  # a page on another port of this machine
    assert status("POST", origin="http://elsewhere.example") == 403
    assert status("POST", origin="http://[") == 403
    for host in ("elsewhere.example", "localhost.elsewhere.example:80", "a@localhost", "localhost/..", "[", ""):
        assert status("GET", host=host) == 400
        refused = client.get(f"{server.url}/health", headers={"host": host})
        assert refused.json()["detail"].startswith(f"Host: got '{host}'; allowed are localhost, 127.0.0.1, [::1]")
    for host in (own, "localhost", "LocalHost:80", "[::1]:80"):
        assert client.get(f"{server.url}/health", headers={"host": host}).status_code == 200
    assert status("POST", sec_fetch_site="same-origin") == status("POST", origin=f"http://{own}") == 415


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP, signal.SIGTERM)])
def test_requests_in_progress_are_answered_before_the_stop(
    finished_run: Path, start: Callable[..., Server], numbers: tuple[int, ...]
) -> None:
    """systemd can send SIGHUP with SIGTERM."""
    server = start(finished_run, "--port", "0", "--max-model-bytes", "100000")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server.url, [bytes(30_000)] * 4)
        while "bfsys_file_bytes_total 120000.0" not in client.get(f"{server.url}/metrics").text:
            time.sleep(0.005)
        for number in numbers[:-1]:
            server.process.send_signal(number)
        code, printed = server.stop(numbers[-1])
        assert waiting.result().status_code == 200
    assert (code, printed) == (0, "")
    with pytest.raises(httpx.ConnectError):
        client.get(f"{server.url}/health")


NEVER_COMPUTES = """
import threading
from bfsys.cli import main
from bfsys.serve.service import Service
Service._compute = lambda *_: threading.Event().wait()
main()
"""


def test_a_second_signal_does_not_wait(finished_run: Path, start: Callable[..., Server]) -> None:
    server = start(finished_run, "--port", "0", "--timeout", "1000", program=("-c", NEVER_COMPUTES))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server.url, [b"waits"])
        while "bfsys_files_total 1.0" not in client.get(f"{server.url}/metrics").text:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        with suppress(httpx.TransportError):  # after the first signal, it accepts no connection
            while client.get(f"{server.url}/health"):
                time.sleep(0.005)
        assert server.stop(signal.SIGINT) == (0, "")
        assert waiting.result().status_code == 503


def test_no_file_is_written(finished_run: Path, start: Callable[..., Server]) -> None:
    """The kernel refuses every write to a file. Multipart libraries write files above 1 MB to disk."""
    server = start(finished_run, "--port", "0")
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
    answered = post(server.url, [bytes(3_000_000), b"good", bytes(1_500_000)])
    assert [sorted(answer) for answer in answered.json()["answers"]] == [
        ["error", "name"], ["name", "out_of_distribution", "top"], ["error", "name"],
    ]  # fmt: skip
    opened = []
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection may be closed meanwhile
            opened.append(os.readlink(entry))
    assert not [name for name in opened if "(deleted)" in name]
    assert server.stop() == (0, "")


def test_connections_do_not_wait_to_send() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio's condition for TCP_NODELAY


def test_the_event_loop_reads_no_files(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bfsys.serve.limits import Limits
    from bfsys.serve.service import Service
    from bfsys.serve.uploads import Upload

    service = Service(bfsys.load(finished_run), Limits())
    threads = {}

    def traced(name: str) -> Callable[..., object]:
        method = getattr(service, name)

        def call(*args: object, **options: bool) -> object:
            threads[name] = threading.current_thread()
            return method(*args, **options)

        return call

    for name in ("_prepared", "_answer"):
        monkeypatch.setattr(service, name, traced(name))
    try:
        answers, status = asyncio.run(service.answers([Upload("a", bytearray(range(256)))], top=1, encode=False))
    finally:
        assert service.close(900)
    assert (status, len(answers)) == (200, 1)
    assert threads.keys() == {"_prepared", "_answer"}
    assert threading.main_thread() not in threads.values()


def fails(*arguments: str | Path, **variables: str) -> str:
    command = [sys.executable, "-m", "bfsys", "serve", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, env={**os.environ, **variables}
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_wrong_addresses_options_and_runs_end_with_one_line(server: Server, finished_run: Path) -> None:
    port = server.url.rpartition(":")[2]
    assert "Address already in use" in fails(finished_run, "--port", port)
    assert "cannot be resolved" in fails(finished_run, "--host", "no.such.host.invalid")
    assert "Cannot assign requested address" in fails(finished_run, "--host", "192.0.2.1")
    assert "--timeout: got 0.0" in fails(finished_run, "--timeout", "0")
    assert "--port: got 70000" in fails(finished_run, "--port", "70000")
    assert "no such directory" in fails(finished_run / "none", "--port", "0")


def test_a_missing_package_is_named(finished_run: Path) -> None:
    code = (
        "import sys; from importlib import util; found = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'uvicorn' else found(name)\n"
        "from bfsys.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", finished_run], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )
    assert (done.returncode, done.stderr) == (
        2, "error: serve needs uvicorn, not installed here; use pip install 'bfsys[serve]'\n",
    )  # fmt: skip
