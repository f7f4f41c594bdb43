"""Standard output and error with real descriptors, and commands with the consoles that users have."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bfsys import console
from bfsys.console import Console, OutputClosed
from tests.conftest import REPOSITORY


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):  # the test has closed it
            os.close(end)


def make_console(descriptor: int, log: Path | None = None, *, encoding: str = "utf-8", fails: bool = False) -> Console:
    made = Console(descriptor, "standard output", encoding, fails=fails)
    made.log = log
    return made


def test_lines_arrive_whole(pipe: tuple[int, int]) -> None:
    out = make_console(pipe[1])
    print("one", "line", end="", file=out)
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 100)
    print(" of two parts", file=out)
    assert os.read(pipe[0], 100) == b"one line of two parts\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "· ü"), ("ascii", "\\xb7 \\xfc"), ("latin-1", "· ü"), ("cp1251", "· \\xfc")]
)
def test_characters_that_an_encoding_lacks_are_escaped(pipe: tuple[int, int], encoding: str, shown: str) -> None:
    print("· ü", file=make_console(pipe[1], encoding=encoding, fails=True))
    assert os.read(pipe[0], 100).decode(encoding) == shown + "\n"


def test_a_byte_order_mark_is_written_only_at_the_start(pipe: tuple[int, int]) -> None:
    out = make_console(pipe[1], encoding="utf-16", fails=True)
    print("one ü", file=out)
    print("two", os.fsdecode(b"a\xff"), file=out)
    assert os.read(pipe[0], 100).decode("utf-16") == "one ü\ntwo a\\udcff\n"


def test_a_file_name_that_is_not_text_is_escaped(pipe: tuple[int, int]) -> None:
    print(os.fsdecode(b"a\xff"), file=make_console(pipe[1]))
    assert os.read(pipe[0], 100) == b"a\\udcff\n"


def test_lines_that_a_closed_pipe_does_not_accept_go_to_the_log(pipe: tuple[int, int], tmp_path: Path) -> None:
    os.close(pipe[0])
    out = make_console(pipe[1], tmp_path / "log" / "rank-0.log")
    print("step 1", file=out)
    print("step 2", file=out)
    head, *lines = (tmp_path / "log" / "rank-0.log").read_text().splitlines()
    assert "lines that standard output did not accept (Broken pipe)" in head
    assert lines == ["step 1", "step 2"]


def test_a_full_disk_loses_no_step_even_if_the_log_is_on_it() -> None:
    with open("/dev/full", "wb") as full:
        print("step 1", file=make_console(full.fileno(), Path("/dev/full")))


def test_a_closed_descriptor_is_not_an_error(pipe: tuple[int, int], tmp_path: Path) -> None:
    os.close(pipe[1])
    print("step 1", file=make_console(pipe[1], tmp_path / "log"))
    assert (tmp_path / "log").read_text().endswith("step 1\n")


def test_a_reader_that_has_stopped_is_waited_for_once_only(
    pipe: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader pauses after Ctrl-S, or while a pager shows the first page."""
    monkeypatch.setattr(console, "PATIENCE_S", 0.1)
    out = make_console(pipe[1], tmp_path / "log")
    line = "x" * 999
    with suppress(OSError):  # with pages of 64 KiB, it would hold 1 MiB
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 16)
    for _ in range(100):
        print(line, file=out)
    kept = (tmp_path / "log").read_text().count(line)
    assert kept > 30
    assert os.read(pipe[0], 1 << 20).count(line.encode()) + kept in (99, 100)  # one line may be truncated
    print("it reads again", file=out)
    assert os.read(pipe[0], 1 << 20) == b"it reads again\n"


def test_a_command_whose_output_is_its_work_fails_without_it(pipe: tuple[int, int]) -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left on device: 'standard output'"):
        print("answer", file=make_console(full.fileno(), fails=True))
    os.close(pipe[0])
    with pytest.raises(OutputClosed):
        print("answer", file=make_console(pipe[1], fails=True))


def test_a_console_that_was_closed_before_the_start_has_a_log_too(tmp_path: Path) -> None:
    print("answer", file=make_console(-1, fails=True))  # a closed console is not an error here
    out = make_console(-1, tmp_path / "log")
    print("step 1", file=out)
    assert (tmp_path / "log").read_text().endswith("step 1\n")
    assert not out.isatty()


def test_only_real_consoles_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", mine)
    console.prepare()
    console.go_on_without()
    assert sys.stdout is sys.stderr is mine


# A command that prints, does its work, and prints again.
COMMAND = """
import sys
from pathlib import Path
from bfsys.errors import run_command
def main():
    print("begun ·", flush=True)
    Path(sys.argv[1]).write_text("work")
    print("done ·")
    print("a warning ·", file=sys.stderr)
run_command(main, output_is_optional=sys.argv[2] == "optional")
"""


@pytest.mark.parametrize(
    ("redirection", "code_if_optional", "code_if_not"),
    [
        (">/dev/full", 0, 2),
        (">&-", 0, 0),
        (">&- 2>&- <&-", 0, 0),
        ("2>/dev/full", 0, 0),
        ("2>&-", 0, 0),
        ("| true", 0, 0),
        ("| head -n 1", 0, 0),
    ],
)
def test_commands_with_all_kinds_of_consoles(
    redirection: str, code_if_optional: int, code_if_not: int, tmp_path: Path
) -> None:
    for kind, code in (("optional", code_if_optional), ("product", code_if_not)):
        work = tmp_path / kind
        shell = f"set -o pipefail; {sys.executable} -c '{COMMAND}' {work} {kind} {redirection}"
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, env=env)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        if kind == "optional":
            assert work.read_text() == "work"
    if redirection == ">/dev/full":
        assert done.stderr == "error: standard output: No space left on device\n"


def test_a_file_that_is_opened_does_not_take_the_place_of_a_closed_console(tmp_path: Path) -> None:
    code = (
        "from bfsys.errors import run_command\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'data')!r}, 'w') as file:\n"
        "        print('said', flush=True)\n"
        "        file.write('data')\n"
        "run_command(main, output_is_optional=True)\n"
    )
    shell = f'{sys.executable} -c "{code}" >&-'
    assert subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, timeout=900).returncode == 0
    assert (tmp_path / "data").read_text() == "data"
