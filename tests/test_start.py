from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bfsys.errors import EXIT_STOPPED
from tests.conftest import REPOSITORY

# Ctrl-C arrives when a module is looked for.
INTERRUPTED = """
import os, runpy, signal, sys

wanted = sys.argv[1]

class Interrupted:
    def find_spec(self, name, *rest):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupted())
signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
sys.path[:0] = [os.path.dirname(sys.argv[3])]
program, sys.argv = sys.argv[3], ["program", "--version"]
runpy.run_path(program, run_name="__main__")
"""
PROGRAMS = [
    path
    for folder in ("tools", "launchers", "bfsys", "bfsys/checkpoint")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
    if "bfsys.start import" in path.read_text()
]
BENCHMARKS = [
    path
    for folder in ("bench", "quickstart")
    for path in sorted((REPOSITORY / "tools" / folder).glob("*.py"))
    if "sys.path[0] =" in path.read_text() and "    run_command(main" in path.read_text()
]


def interrupted_at(module: str, handler: str, program: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", INTERRUPTED, module, handler, str(program)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_control_c_before_a_command_is_imported_shows_no_traceback(program: Path) -> None:
    done = interrupted_at("bfsys.cli", "default_int_handler", program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # a shell shows 130


@pytest.mark.parametrize("program", BENCHMARKS, ids=lambda path: path.name)
def test_control_c_before_a_benchmark_is_imported_shows_no_traceback(program: Path) -> None:
    done = interrupted_at("bfsys.errors", "default_int_handler", program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_control_c_stops_a_command_while_it_is_imported() -> None:
    done = interrupted_at("importlib.metadata._meta", "default_int_handler", REPOSITORY / "bfsys" / "__main__.py")
    assert done.returncode in (-signal.SIGINT, EXIT_STOPPED)
    assert "Traceback" not in done.stderr


def test_a_background_command_continues_to_ignore_control_c() -> None:
    done = interrupted_at("bfsys.cli", "SIG_IGN", REPOSITORY / "bfsys" / "__main__.py")
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "bfsys", "")


def test_all_programs_of_commands_are_tested() -> None:
    assert len(PROGRAMS) > 15
    assert not [path for path in (REPOSITORY / "tools").glob("*.py") if path not in PROGRAMS]
    assert "bfsys = bfsys.start:main" in (REPOSITORY / "setup.cfg").read_text()
