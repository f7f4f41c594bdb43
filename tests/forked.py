"""Real processes that start in a moment: forked from a server that has imported PyTorch and DeepSpeed already.

Importing takes most of a rank's start, and tests start many. What a process prints goes to files, so that none ever
waits for a reader, and none holds another's pipe open.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[1]


class Forked:
    """A process that calls `act(*arguments)`, with the interface of subprocess.Popen."""

    port: socket.socket | None = None
    """Holds the port of the ranks."""

    def __init__(self, act: Callable, arguments: Sequence, variables: dict[str, str]) -> None:
        self._files = [tempfile.NamedTemporaryFile(prefix="forked-") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        self._process = server_context().Process(
            target=_begin, args=({**os.environ, **variables}, names, act, tuple(arguments)), daemon=True
        )
        self._process.start()
        self.args, self.pid = arguments, self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end, and return (standard output, standard error)."""
        self._process.join(timeout)
        assert self.poll() is not None, f"no end after {timeout} s: {self.said()}"
        return self.said()

    def said(self) -> tuple[str, str]:
        out, errors = (Path(file.name).read_text(errors="replace") for file in self._files)
        return out, errors


def start_ranks(
    world_size: int, act: Callable, arguments: Sequence, variables: Sequence[dict[str, str]] = ()
) -> list[Forked]:
    """Call `act(*arguments)` on ranks that use gloo, like those of a launcher."""
    # This socket does not listen. While it is open, rank 0 can listen on its port, and the kernel gives the port to no
    # other process that asks for any free one.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    port = held.getsockname()[1]
    ranks = [
        Forked(act, arguments, {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        })
        for rank in range(world_size)
    ]  # fmt: skip
    ranks[0].port = held
    return ranks


def answer_of(act: Callable, *arguments: object) -> object:
    """Return the result of `act(*arguments)` in a forked process. It must be valid as JSON."""
    process = Forked(_print_answer, (act, *arguments), {})
    said, errors = process.communicate(900)
    assert process.returncode == 0, said + errors
    return json.loads(said.splitlines()[-1])


def _print_answer(act: Callable, *arguments: object) -> None:
    print(json.dumps(act(*arguments)))


def run_python(*arguments: str) -> None:
    """Run the same as `python ARGUMENTS…`: a script, or -c and a program."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def server_context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    # Libraries read these variables when the fork server loads them. Tests in this process may use a GPU. Training does
    # not import the compiler, which takes seconds, unless a config needs it.
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    with patch.dict(os.environ, variables):
        forkserver.ensure_running()
    return context


def _begin(variables: dict[str, str], names: Sequence[str], act: Callable, arguments: Sequence) -> None:
    # It is killed with the tests, like a daemon, but it may have children, such as loader processes.
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method(None, force=True)  # reset it to that of a new program
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(names, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    code = 0
    try:
        act(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
