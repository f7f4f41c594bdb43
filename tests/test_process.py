from __future__ import annotations

import configparser
import os
import pwd
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bfsys import process
from tests.conftest import REPOSITORY


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_end_of_a_child_is_seen_if_the_parent_ignored_such_ends() -> None:
    code = (
        "import subprocess, sys; from bfsys import process; process.prepare(); "
        "sys.exit(subprocess.run([sys.executable, '-c', 'raise SystemExit(7)']).returncode)"
    )
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", ignore, sys.executable, "-c", code], cwd=REPOSITORY, timeout=900)
    assert done.returncode == 7


def test_a_process_that_dies_with_its_parent_is_killed_rather_than_it_if_memory_runs_out() -> None:
    code = "import os; from bfsys import process; process.die_with(os.getppid()); print(process.OOM_SCORE.read_text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=900, capture_output=True, text=True)
    assert int(done.stdout) == min(1000, int(process.OOM_SCORE.read_text()) + process.KILLED_RATHER)


def test_numpy_starts_no_threads_which_a_limit_could_refuse() -> None:
    code = "from bfsys import process; process.prepare(); import numpy, os; print(len(os.listdir('/proc/self/task')))"
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=900, capture_output=True, env=env)
    assert done.stdout == b"1\n"


def test_signals_arrive_if_the_parent_blocked_them() -> None:
    code = "import os, signal; from bfsys import process; process.prepare(); os.kill(os.getpid(), signal.SIGTERM)"
    block = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); "
        "os.execv(sys.executable, sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", block, sys.executable, "-c", code], cwd=REPOSITORY, timeout=900)
    assert done.returncode == -signal.SIGTERM


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    process.prepare()
    assert process.open_files_limit() == limits[1] > 64


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "900000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu.max": "?"}, 6),
        ({}, 6),
    ],
)
def test_a_quota_of_cpu_time_limits_the_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    assert process.usable_cores() == cores


STAT = "inactive_file 20\nactive_file 10\n"


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {"memory.max": "400\n", "memory.current": "130\n", "memory.stat": STAT}, 300),
        ("0::/\n", {"memory.max": "100\n", "memory.current": "190\n", "memory.stat": STAT}, 0),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "190\n", "memory.stat": STAT}, 5000),
        # A limit of the job in SLURM, and none of its step.
        (
            "0::/job/step\n",
            {
                "job/step/memory.max": "max\n",
                "job/step/memory.current": "40\n",
                "job/step/memory.stat": STAT,
                "job/memory.max": "700\n",
                "job/memory.current": "130\n",
                "job/memory.stat": STAT,
            },
            600,
        ),
        # In a container, the name may be that outside it. Version 1 of cgroups has a limit above all memory by default.
        (
            "9:cpu:/docker/1\n4:memory:/docker/1\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "700\n",
                "memory/memory.usage_in_bytes": "200\n",
                "memory/memory.stat": "active_file 1\ninactive_file 1\ntotal_active_file 60\ntotal_inactive_file 40\n",
            },
            600,
        ),
        (None, {}, 5000),
    ],
)
def test_a_limit_of_memory_counts(
    own: str | None, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    monkeypatch.setattr(process, "OWN_GROUPS", tmp_path / "own")
    assert process.free_memory_bytes() == free


def test_threads_are_counted_up_to_the_limit_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    really_start, possible = threading.Thread.start, iter(range(3))

    def start(thread: threading.Thread) -> None:
        if next(possible, None) is None:
            raise RuntimeError("can't start new thread")
        really_start(thread)

    before = threading.active_count()
    assert process.threads_that_start(2) == 2
    monkeypatch.setattr(threading.Thread, "start", start)
    assert process.threads_that_start(5) == 3
    assert threading.active_count() == before


@pytest.mark.parametrize(("has_entry", "name"), [(False, "uid-12345"), (True, None)])
def test_a_user_without_an_entry_gets_a_name(
    has_entry: bool, name: str | None, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)

    def getpwuid(uid: int) -> None:
        if not has_entry:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    process.prepare()
    assert os.environ.get("USER") == name
    os.environ.pop("USER", None)


def test_the_oldest_releases_are_those_of_setup_cfg() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    asked = f"{setup['options']['install_requires']}\n{setup['options.extras_require']['train']}".splitlines()
    for name, oldest in process.OLDEST.items():
        assert any(line.startswith(f"{name}>={oldest}") for line in asked), name


def run_with(folder: Path, **versions: str) -> subprocess.CompletedProcess:
    """Run a command in an environment where packages report these versions."""
    for name, version in versions.items():
        (folder / f"{name}-{version}.dist-info").mkdir()
        content = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(content)
    program = "from bfsys.errors import run_command; run_command(lambda: print('ran'))"
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=900)


def test_a_command_does_not_start_with_packages_that_are_too_old(tmp_path: Path) -> None:
    done = run_with(tmp_path, torch="2.9.1+cu128", pydantic="1.10.26", deepspeed="0.19.10")
    assert (done.returncode, done.stdout) == (2, "")
    torch, pydantic = done.stderr.splitlines()
    assert "torch 2.9.1+cu128 is installed, but bfsys needs torch 2.11 or newer" in torch
    assert "pip install 'pydantic>=2.6'" in pydantic


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+a6d1dd2", "2.15.1rc2", "3.0"])
def test_a_command_starts_with_packages_that_are_new_enough(version: str, tmp_path: Path) -> None:
    done = run_with(tmp_path, torch=version)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")
