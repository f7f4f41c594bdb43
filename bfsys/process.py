"""The process of a command: its limits, its environment, and the library versions that it requires."""

from __future__ import annotations

import ctypes
import math
import os
import pwd
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

# The oldest releases that work, as in setup.cfg. pip checks them when it installs bfsys, but a container may have other
# versions, and installing another package may replace them.
OLDEST = {"torch": "2.11", "pydantic": "2.6", "pillow": "11.3", "deepspeed": "0.19.8"}

OOM_SCORE = Path("/proc/self/oom_score_adj")
CGROUP = Path("/sys/fs/cgroup")  # in a container, the root is often its own group
OWN_GROUPS = Path("/proc/self/cgroup")
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
KILLED_RATHER = 100  # thousandths of the memory, by which a process counts as larger if memory runs out
SENDERS = {
    signal.SIGKILL: "the kernel sends it if memory runs out, and `dmesg` shows that",
    signal.SIGXCPU: "the kernel sends it at the limit of CPU time, which `ulimit -t` shows",
}
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: not much is safe between fork and exec
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}


def prepare() -> None:
    """Raise the limit of open files as far as allowed, set a name for a user without a passwd entry, keep NumPy to
    one thread and Triton to one rounding, and receive all signals, also those of ended child processes.

    Containers may run under such users (`docker run --user 12345`, OpenShift). PyTorch reads the user's name when it is
    imported, and fails if there is none. A parent that ignores SIGCHLD hands that down, and a child's exit code would
    then be lost. A parent that blocks signals hands that down, too.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems report a higher limit than they allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # OpenBLAS starts threads when NumPy is imported. If it cannot, it sends SIGINT, and a command seems to be stopped.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Triton 3.9 warns that another release will round differently by default. A run must keep its rounding.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"


@contextmanager
def blocking(signals: Iterable[int]) -> Iterator[None]:
    """Block signals within this context. Processes that are started in it begin with these signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handling(signals: Iterable[int], handler: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """Handle signals by `handler` within this context."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends. If memory runs out, the kernel kills this process rather than its
    parent, which then says why, and starts it again."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before this was set
        os._exit(128 + signal.SIGKILL)
    with suppress(OSError, ValueError):  # some containers have no such file
        of_parent = int(OOM_SCORE.read_text())
        OOM_SCORE.write_text(str(min(1000, of_parent + KILLED_RATHER)))


def end_of(code: int) -> str:
    """How a process ended, from its exit code; -N and 128 + N mean that signal N killed it."""
    code = 128 - code if code < 0 else code
    text = f"ended with code {code}"
    try:
        number = signal.Signals(code - 128)
    except ValueError:
        return text
    return f"{text}: {number.name} killed it" + (f" ({SENDERS[number]})" if number in SENDERS else "")


def set_name(name: bytes) -> None:
    """Set the name by which `ps` and `top` show this process, at most 15 bytes."""
    _libc.prctl(PR_SET_NAME, name)


def open_files_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def usable_cores() -> int:
    """The cores that this process may use: those of its affinity, or fewer if it is in a container with a quota of CPU
    time (docker run --cpus, resources.limits of Kubernetes). With more threads than that, all of them wait for most of
    each period."""
    return math.ceil(min(len(os.sched_getaffinity(0)), _quota_of_cores()))


def _quota_of_cores() -> float:
    with suppress(OSError, ValueError):
        limit, period = (CGROUP / "cpu.max").read_text().split()
        return float(limit) / float(period) if limit != "max" else math.inf
    with suppress(OSError, ValueError):  # version 1 of cgroups: -1 if there is no quota
        limit, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(limit) / float(period) if float(limit) > 0 else math.inf
    return math.inf


def free_memory_bytes() -> int:
    """The memory that this process may still take: what the machine has, or less if it is in a group with a limit
    (docker run --memory, SLURM, limits of Kubernetes). Memory in which the system keeps files counts as free."""
    import psutil  # not at the start of every command, since it takes long

    return int(min([psutil.virtual_memory().available, *_free_in_groups()]))


def _free_in_groups() -> Iterator[int]:
    groups: list[str] = []
    with suppress(OSError):
        groups = OWN_GROUPS.read_text().splitlines()
    for _, controllers, name in (line.split(":", 2) for line in groups):
        if controllers not in ("", "memory"):
            continue
        is_v1 = controllers == "memory"
        limit, usage, kept = ("limit_in_bytes", "usage_in_bytes", "total_") if is_v1 else ("max", "current", "")
        mount = CGROUP / controllers
        group = mount / name.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # `max` means that there is no limit
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                files = int(stat[f"{kept}active_file"]) + int(stat[f"{kept}inactive_file"])
                free = int((folder / f"memory.{limit}").read_text()) - int((folder / f"memory.{usage}").read_text())
                yield max(0, free + files)
            if folder == mount:
                break


def threads_that_start(wanted: int) -> int:
    """The number of further threads that can be started, at most `wanted`. They are started and ended, because the
    limit may be that of a user, of a container, or of a group of processes that contains it."""
    may_end = threading.Event()
    started: list[threading.Thread] = []
    with suppress(RuntimeError):  # from Python, if a thread cannot be started
        while len(started) < wanted:
            thread = threading.Thread(target=may_end.wait, daemon=True)
            thread.start()
            started.append(thread)
    may_end.set()
    for thread in started:
        thread.join()
    return len(started)


def outdated_packages() -> list[str]:
    """A problem for each installed package that is older than OLDEST allows. No package is imported.

    A pre-release counts as its release, since NVIDIA's containers have such builds of PyTorch ("2.11.0a0+a6d1dd2").
    """
    problems = []
    for name, oldest in OLDEST.items():
        with suppress(metadata.PackageNotFoundError):  # only some commands need DeepSpeed
            found = metadata.version(name)
            if found and _release(found) < _release(oldest):  # None if the metadata of a package are broken
                problems.append(
                    f"{name} {found} is installed, but bfsys needs {name} {oldest} or newer; upgrade it in this "
                    f"environment (pip install '{name}>={oldest}'), or use another environment"
                )
    return problems


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning: (2, 12, 1) of "2.12.1+cu130"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
