"""Every scheme is read through its usual program; nothing hangs, leaks a secret or leaves a process."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bfsys.data.storage.remote import Cache, RemoteFile
from bfsys.data.storage.streams import TryFailed, stream, url_of
from bfsys.errors import EXIT_CRASHED, EXIT_USER_ERROR, UserError
from bfsys.locations import base_name, hide, hide_in, is_remote
from tests.data.conftest import CONTENT, make_cache, names, put, sha256
from tests.data.http_server import FaultyServer

pytestmark = pytest.mark.usefixtures("no_orphans")


@pytest.mark.parametrize(
    "location", ["s3://b/d", "gs://b", "http://h/d", "https://h/d", "pipe:cat {file}", "file:///d"]
)
def test_remote_locations(location: str) -> None:
    assert is_remote(location)


@pytest.mark.parametrize("location", ["/a/b", "a/b", ".", "C:data", "a:b/c", "/a://b"])
def test_local_locations(location: str) -> None:
    assert not is_remote(location)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://host/dir", "https://host/dir/x%20y.tar"),
        ("https://host/dir/", "https://host/dir/x%20y.tar"),
        ("https://host/dir?key=a/b&c=1", "https://host/dir/x%20y.tar?key=a/b&c=1"),
        (
            "https://me:p%40w@[::1]:80/my dir/é#1/a%20b?k=a b&s=c%2F",
            "https://me:p%40w@[::1]:80/my%20dir/%C3%A9%231/a%20b/x%20y.tar?k=a%20b&s=c%2F",
        ),
        ("https://bücher.de/dir", "https://bücher.de/dir/x%20y.tar"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/p/d", "s3://arn:aws:s3:eu-west-1:1:accesspoint/p/d/x y.tar"),
        ("s3://bucket/my dir/", "s3://bucket/my dir/x y.tar"),
        ("/a/b", "/a/b/x y.tar"),
    ],
)
def test_url_of(location: str, url: str) -> None:
    assert url_of(location, "x y.tar") == url


def test_url_of_a_command() -> None:
    assert url_of("pipe:cat a/{file} | tee {file}", "été-0.tar") == "pipe:cat a/été-0.tar | tee été-0.tar"
    with pytest.raises(UserError, match=r"pipe:cat … file: lacks \{file\}.* pipe:aws s3 cp s3://bucket/dir/\{file\} -"):
        url_of("pipe:cat secret", "x.tar")


@pytest.mark.parametrize("location", ["http://", "https:///dir", "s3://", "gs:///bucket"])
def test_an_address_without_a_host_is_refused(location: str) -> None:
    with pytest.raises(UserError, match="is an incomplete address"):
        url_of(location, "dataset.json")


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1/dir", "http://host:99999/dir", "https://me:pw@host:port/dir", "https://me:pw/d@host/dir",
        "https://me:pw?d@host/dir", "https://me:pw#d@host/dir",
    ],
)  # fmt: skip
def test_a_wrong_address_is_refused(location: str) -> None:
    with pytest.raises(UserError, match="is not an address") as caught:
        url_of(location, "dataset.json")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("file", ["x;reboot", "$(reboot)", "a b", "-x", "a'b", "", "a\nb", "`a`", "a>b"])
def test_no_file_name_becomes_a_command(file: str) -> None:
    with pytest.raises(UserError, match="cannot be used in a command"):
        url_of("pipe:cat /d/{file}", file)


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("https://me:pw@host/d/x%20y.tar?sig=secret", "https://***@host/d/x%20y.tar?***", "x y.tar"),
        ("s3://bucket/d/x.tar", "s3://bucket/d/x.tar", "x.tar"),
        ("https://me:p@w@host/d e/x.tar?sig=a secret", "https://***@host/d e/x.tar?***", "x.tar"),
        ("https://me:p/w@host/x.tar?sig=secret", "https://***@host/x.tar?***", "x.tar"),
        ("http://host:80/a@b/x.tar", "http://host:80/a@b/x.tar", "x.tar"),
        ("http://[::1]/a@b/x.tar", "http://[::1]/a@b/x.tar", "x.tar"),
        ("https://host/x.tar?next=https://other/y&sig=secret", "https://host/x.tar?***", "x.tar"),
        ("pipe:KEY=secret curl -H 'Auth: secret' https://h/d/x.tar?secret", "pipe:curl … x.tar", "x.tar"),
        ("pipe:aws s3 cp s3://b/d/x.tar - --endpoint-url http://127.0.0.1:80", "pipe:aws … x.tar", "x.tar"),
    ],
)
def test_secrets_are_hidden(url: str, shown: str, name: str) -> None:
    assert hide(url) == shown
    assert base_name(url) == name


def test_errors_show_no_secrets() -> None:
    error = UserError("runs_dir: got 'https://me:pw@host/d?sig=secret': is https://host/a@b?c=secret: a folder?", "b?c")
    assert error.problems == ("runs_dir: got 'https://***@host/d?***': is https://host/a@b?***: a folder?", "b?c")
    assert UserError(*error.problems).problems == error.problems


def test_secrets_are_hidden_in_long_texts() -> None:
    """The time must not grow with the square of the length: this would take an hour."""
    text = "a://" * 100_000
    assert hide_in(text) == text
    assert hide_in(f"{text}me:pw@host") == f"{text}***@host"


def test_local_files(tmp_path: Path, cache: Cache) -> None:
    file = put(tmp_path, "a b.tar", 1000)
    assert cache.fetch(file).read_bytes() == cache.read(file.url)
    assert names(cache) == [f"{file.sha256[:16]}-a_b.tar"]
    assert cache.read(f"file://{tmp_path}/a%20b.tar") == cache.read(file.url)
    with pytest.raises(UserError, match="No such file or directory"):
        cache.read(str(tmp_path / "typo"))


def test_commands(tmp_path: Path, cache: Cache) -> None:
    file = put(tmp_path, "x.tar", 100_000)
    location = f"pipe:cat {shlex.quote(str(tmp_path))}/{{file}} | cat  # a comment"
    file = replace(file, url=url_of(location, "x.tar"))
    assert sha256(cache.fetch(file).read_bytes()) == file.sha256
    with pytest.raises(UserError, match=r"pipe:cat … typo\.tar: .*2: ended at 0 bytes \(exit status 1: cat: .*No such"):
        cache.read(url_of(f"pipe:cat {tmp_path}/{{file}}", "typo.tar"))
    with pytest.raises(UserError, match=r"ended at 3 bytes \(exit status 7\)"):
        cache.read("pipe:printf abc; exit 7")


@pytest.mark.parametrize("command", ["no_such_command_here {file}", "{folder}/not_executable {file}"])
def test_a_command_that_cannot_be_run_is_an_error_at_once(tmp_path: Path, cache: Cache, command: str) -> None:
    (tmp_path / "not_executable").touch()
    with pytest.raises(
        UserError, match=r"^pipe:\S+ … file: the command cannot be run \(exit status 12[67]: "
    ) as caught:
        cache.read(f"pipe:{command.replace('{folder}', str(tmp_path)).replace('{file}', 'x')}")
    assert caught.value.exit_code == EXIT_USER_ERROR


def test_a_pipeline_that_begins_with_a_missing_command_is_an_error(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"ended at 0 bytes \(exit status 0: .*no_such_command_here.*not found"):
        cache.read("pipe:no_such_command_here | cat")


@pytest.mark.parametrize(
    ("retry_after", "asked_s"), [("", 0), ("7", 7), ("soon", 0), ("-3", 0), ("Thu, 01 Jan 2099 00:00:00 GMT", 10**8)]
)
def test_a_server_may_ask_for_a_pause(server: FaultyServer, retry_after: str, asked_s: float) -> None:
    server.retry_after = retry_after
    server.fail("/x.tar", ["503"])
    with pytest.raises(TryFailed, match="HTTP status 503") as caught:
        list(stream(f"{server.url}/x.tar", 60.0, threading.Event()))
    assert caught.value.retry_after_s == asked_s or caught.value.retry_after_s > asked_s > 10


def test_credentials_may_be_in_netrc(
    server: FaultyServer, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.read(f"{server.url}/x.tar")
    assert server.credentials == {None}
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pw\n")
    cache.read(f"{server.url}/x.tar")
    assert server.credentials == {None, f"Basic {b64encode(b'me:pw').decode()}"}


def test_a_refused_connection_is_reported_with_the_message_of_the_program(
    cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.tar"
        with pytest.raises(UserError, match="could not be fetched in 3 tries") as caught:
            cache.read(url)
    assert caught.value.exit_code == EXIT_CRASHED
    assert f"{url}: try 1 of 3 failed (ended at 0 bytes (exit status 7: curl: (7) " in capfd.readouterr().err


def test_a_silent_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, stall_s=0.2, attempts=2)
    with pytest.raises(UserError, match=r"stalled for 0\.2 s after 0 bytes"):
        cache.read("pipe:(sleep 1000; true) | (sh -c 'sleep 1001; true' | cat)")
    with pytest.raises(UserError, match="the command did not end after 4 bytes"):
        make_cache(tmp_path, stall_s=5.0, attempts=1).read(
            "pipe:echo abc; exec >/dev/null; sleep 1000; true"
        )  # the fixture checks for files that are left


def test_unknown_schemes_and_missing_programs(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nonsense://a/b: cannot be opened .* schemes are: .*gs.* http, .*s3"):
        cache.read("nonsense://a/b")
    monkeypatch.setenv("PATH", "/nowhere")
    for scheme, program in {"s3": "aws", "gs": "gsutil", "https": "curl"}.items():
        with pytest.raises(UserError, match=rf"{scheme}:// is read with '{program}', .* pipe:aws s3 cp"):
            cache.read(f"{scheme}://bucket/dataset.json")


def test_google_storage(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gsutil"  # replaces the real program
    program.write_text('#!/bin/sh\necho "$@"\necho ServiceException: 401 >&2\nexit $FAIL\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "0")
    assert cache.read("gs://bucket/it's $HOME.tar") == b"-q cat gs://bucket/it's $HOME.tar\n"
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(UserError, match=r"exit status 1: ServiceException: 401"):
        cache.read("gs://bucket/x.tar")


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """An S3 server with a file. Yields the environment with which programs find it."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="bucket")
        s3.put_object(Bucket="bucket", Key="dir/x.tar", Body=CONTENT)
        yield environment
    server.stop()


def test_s3_by_a_command(bucket: dict[str, str], cache: Cache) -> None:
    code = "import boto3, sys; boto3.client('s3').download_fileobj('bucket', sys.argv[1], sys.stdout.buffer)"
    location = f"pipe:{sys.executable} -c {shlex.quote(code)} dir/{{file}}"
    path = cache.fetch(RemoteFile(url_of(location, "x.tar"), sha256(CONTENT), len(CONTENT)))
    assert path.read_bytes() == CONTENT
    assert names(cache) == [path.name]


def test_s3(bucket: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("aws") is None or subprocess.run(["aws", "--version"], capture_output=True).returncode != 0:
        pytest.skip("the AWS command line (aws) does not work here")
    cache = make_cache(tmp_path, attempts=1)
    path = cache.fetch(RemoteFile(url_of("s3://bucket/dir", "x.tar"), sha256(CONTENT), len(CONTENT)))
    assert path.read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"s3://bucket/typo: .*\(404\).* Not Found"):
        cache.read("s3://bucket/typo")
