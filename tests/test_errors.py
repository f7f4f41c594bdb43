from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from bfsys.errors import AGAIN_S, EXIT_CRASHED, UserError, collecting, counted, run_command, summary_of
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


def test_a_long_value_does_not_fill_the_terminal(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError(f"optim.{'x' * 100_000}: unknown key; remove it")

    assert ends_with(main) == 2
    line = capsys.readouterr().err
    assert len(line) < 5_000
    assert line.startswith("error: optim.xxx")
    assert line.endswith("x: unknown key; remove it\n")


def test_control_c_prints_no_traceback(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert ends_with(main) == 130
    assert capsys.readouterr().err == "stopped on request\n"


def test_control_c_prints_no_traceback_after_a_start_that_let_it_end_the_process(
    capsys: pytest.CaptureFixture,
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert ends_with(lambda: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped on request\n"


def test_an_error_that_follows_from_a_dropped_control_c_is_a_stop(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        with suppress(KeyboardInterrupt):  # as PyTorch does while it imports NumPy
            signal.raise_signal(signal.SIGINT)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    assert ends_with(main) == 130
    assert capsys.readouterr().err == "stopped on request\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_is_dropped_comes_again(number: int) -> None:
    def main() -> None:
        with suppress(KeyboardInterrupt):  # as extension modules do while they import others
            signal.raise_signal(number)
        time.sleep(900)

    assert ends_with(main) == 128 + number
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_stop_in_code_that_is_compiled_from_text_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """dataclasses and namedtuple compile text. `python -m` looks at what has passed through such code."""
    (tmp_path / "stopped.py").write_text("""
import signal
from bfsys.errors import run_command
run_command(lambda: exec("signal.raise_signal(signal.SIGTERM)"))
""")
    command = [sys.executable, "-m", "stopped"]
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    end = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)
    assert (end.returncode, end.stderr) == (143, "stopped on request\n")


def test_a_stop_comes_only_once_while_a_command_removes_its_files() -> None:
    removed = []

    @contextmanager
    def file() -> Iterator[None]:
        try:
            yield
        finally:
            time.sleep(3 * AGAIN_S)
            removed.append("generator")

    def main() -> None:
        with ExitStack() as stack, file():
            stack.callback(lambda: (time.sleep(3 * AGAIN_S), removed.append("callback")))
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt:
                try:
                    raise OSError("the file is lost") from None
                except OSError:
                    time.sleep(3 * AGAIN_S)
                    removed.append("except")
                raise
            finally:
                time.sleep(3 * AGAIN_S)
                removed.append("finally")

    assert ends_with(main) == 128 + signal.SIGTERM
    assert removed == ["except", "finally", "generator", "callback"]


# A command that is stopped before its file is complete. The signal arrives twice, and a forked process gets it, too.
STOPPED = """import os, signal, sys
from pathlib import Path
from bfsys.errors import run_command
from bfsys.files import replacing

number, made = int(sys.argv[1]), Path(sys.argv[2])

def main():
    child = os.fork()
    if not child:
        signal.raise_signal(number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == number
    with replacing(made):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # while it removes its files
    made.touch()

run_command(main)"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_leaves_no_unfinished_file(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(int(number)), str(tmp_path / "made")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (128 + number, "stopped on request\n")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_was_started_by_nohup_ignores_sighup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ends_with(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_control_c_ends_the_process_while_it_ends() -> None:
    program = """import atexit, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # as bfsys/start.py
from bfsys.errors import run_command
atexit.register(signal.raise_signal, signal.SIGINT)
run_command(lambda: signal.raise_signal(signal.SIGINT))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "stopped on request\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.OutOfMemoryError, "Allocation on device 0 would exceed allowed memory. (out of memory)"),
        (RuntimeError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_no_traceback(kind: type[RuntimeError], said: str, capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise kind(f"{said}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")

    assert ends_with(main) == EXIT_CRASHED
    assert capsys.readouterr().err == f"error: there is not enough memory: {said}\n"


def test_our_own_mistakes_have_a_traceback(capsys: pytest.CaptureFixture) -> None:
    assert ends_with(lambda: 1 // 0) == 1
    assert "test_errors.py" in capsys.readouterr().err.partition("ZeroDivisionError")[0]


def test_a_current_folder_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert ends_with(lambda: 0) == 2
    assert "the current folder was deleted" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture) -> None:
    assert ends_with(lambda: os.listdir("/nowhere/folder")) == 2
    assert capsys.readouterr().err == "error: /nowhere/folder: No such file or directory\n"


def test_a_machine_without_a_temporary_folder_that_can_be_written_to(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    assert ends_with(lambda: tempfile.gettempdir() and None) == 2
    error = capsys.readouterr().err
    assert "No usable temporary directory" in error
    assert "set TMPDIR" in error
    assert error.count("\n") == 1


def test_an_outage_has_the_code_of_a_crash_so_that_a_launcher_restarts(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "/shared/metrics.jsonl")

    assert ends_with(main) == 1
    assert capsys.readouterr().err == "error: /shared/metrics.jsonl: Stale file handle\n"


def test_a_problem_is_one_line_whatever_a_file_is_called(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("a\nb\x1b[31m·\udcff: is empty")

    assert ends_with(main) == 2
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m·\\udcff: is empty\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 2, "raise the limit (ulimit -n 65536)"),
        (RuntimeError("[enforce fail] pipe: Too many open files"), 2, "raise the limit (ulimit -n 65536)"),
        (
            ImportError("lib.so: failed to map segment from shared object"),
            1,
            "error: there is not enough memory: lib.so",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\nstack"),
            1,
            "enough memory: DefaultCPUAllocator: can't",
        ),
        (RuntimeError("can't start new thread"), 1, "error: a thread cannot be started; raise the limit of processes"),
        (RuntimeError(os.strerror(errno.EAGAIN)), 1, "error: a thread cannot be started; raise the limit of processes"),
        (MemoryError("Unable to allocate 3 GiB"), 1, "error: there is not enough memory: Unable to allocate 3 GiB\n"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        raise error

    assert ends_with(main) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", ["TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG"])
def test_variables_that_pytorch_refuses_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        raise ValueError(f"\nThe value of {name} must be another one.\n")

    monkeypatch.setenv(name, "x")
    assert ends_with(main) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: environment variable {name}: PyTorch refuses 'x'; correct or unset it (")
    assert said.count("\n") == 1
    monkeypatch.delenv(name)
    assert ends_with(main) == 1
    assert "Traceback" in capsys.readouterr().err  # another error


def test_an_exit_code_that_is_text_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert ends_with(lambda: sys.exit("a library gives up")) == 1
    assert capsys.readouterr().err == "a library gives up\n"


def test_help_needs_no_docstrings() -> None:
    assert summary_of("Do a thing.\n\nMore.") == "Do a thing."
    assert summary_of(None) == ""  # with python -OO there are no docstrings


def test_transient_errors_are_not_collected() -> None:
    problems: list[str] = []
    with pytest.raises(UserError, match="away") as caught, collecting(problems):
        raise UserError("the server is away", exit_code=EXIT_CRASHED)
    assert caught.value.exit_code == EXIT_CRASHED
    assert not problems


def test_collecting() -> None:
    problems: list[str] = []
    for number in range(3):
        with collecting(problems):
            if number != 1:
                raise UserError(f"{number} is wrong", "and so on")
    assert problems == ["0 is wrong", "and so on", "2 is wrong", "and so on"]


def test_a_reader_that_closes_the_pipe_is_not_an_error() -> None:
    code = "from bfsys.errors import run_command; run_command(lambda: [print(i) for i in range(100_000)] and 0)"
    shell = f"set -o pipefail; {sys.executable} -c '{code}' | head -n 1"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "file", "0 files"),
        (1, "file", "1 file"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (1_200, "micro-batch", "1,200 micro-batches"),
        (3, "loader process", "3 loader processes"),
        (3, "try", "3 tries"),
    ],
)
def test_a_noun_is_in_the_plural_unless_its_number_is_one(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
