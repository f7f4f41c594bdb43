from __future__ import annotations

import subprocess
import sys

import pytest

from bfsys.errors import UserError, collecting, run_command
from tests.conftest import REPOSITORY


def ends_with(main) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(main)
    return end.value.code


def test_a_command_ends_with_the_code_it_returns() -> None:
    assert ends_with(lambda: None) == 0
    assert ends_with(lambda: 75) == 75


def test_every_problem_is_a_line_and_the_code_is_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("first", "second")

    assert ends_with(main) == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"


def test_control_c_is_no_traceback(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert ends_with(main) == 130
    assert capsys.readouterr().err == "stopped on request\n"


def test_our_own_mistakes_have_a_traceback(capsys: pytest.CaptureFixture) -> None:
    assert ends_with(lambda: 1 // 0) == 1
    assert "test_errors.py" in capsys.readouterr().err.partition("ZeroDivisionError")[0]


def test_collecting() -> None:
    problems: list[str] = []
    for number in range(3):
        with collecting(problems):
            if number != 1:
                raise UserError(f"{number} is wrong", "and so on")
    assert problems == ["0 is wrong", "and so on", "2 is wrong", "and so on"]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "from bfsys.errors import run_command; run_command(lambda: [print(i) for i in range(100_000)] and 0)"
    shell = f"set -o pipefail; {sys.executable} -c '{code}' | head -n 1"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
