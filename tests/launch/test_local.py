"""The local launcher with real processes: small scripts in the place of training, and training itself once."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from bfsys import rendezvous, run_dir
from bfsys.cli import call
from bfsys.config import load_config
from bfsys.errors import EXIT_NO_PROGRESS, EXIT_STORAGE, UserError
from bfsys.launch import local, restart_policy
from bfsys.launch.job import TrainJob
from bfsys.supervision.goodput import read_seconds
from bfsys.supervision.run_end import how_it_ended
from tests.conftest import REPOSITORY
from tests.forked import Forked, run_python
from tests.test_train import lines

LAUNCHER = REPOSITORY / "launchers" / "local.py"

# A rank that writes its process id and that of a child to a file when it is ready.
BEGIN = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
os.chdir(os.path.dirname(os.path.dirname(__file__)))
def ready():
    child = subprocess.Popen(["sleep", "100"])
    with open(f"pids-{rank}.part", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(f"pids-{rank}.part", f"pids-{rank}")
def wait_for_all():
    while not all(os.path.exists(f"pids-{r}") for r in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)
"""


@pytest.fixture
def make_job(tmp_path) -> Iterator[Callable[[str], TrainJob]]:
    """Make a job whose ranks run a script in tmp_path instead of bfsys/train.py. Remaining processes are killed."""

    def make(script: str) -> TrainJob:
        (tmp_path / "bfsys").mkdir()
        (tmp_path / "bfsys" / "train.py").write_text(BEGIN + script)
        return TrainJob(tmp_path / "c.yaml", ("a=1",), tmp_path, tmp_path)

    yield make
    for pid in alive(tmp_path):  # `sleep`, unlike loader processes, does not watch its parent
        os.kill(pid, signal.SIGKILL)


def launch(job: TrainJob, ranks: int) -> Forked:
    """Run the group in a separate process, which gets the test's signals. Returns when all ranks are ready."""
    launcher = Forked(run_group, (job, ranks), {})
    wait_until(lambda: all((job.work_dir / f"pids-{r}").exists() for r in range(ranks)), 900)
    return launcher


def run_group(job: TrainJob, ranks: int) -> None:
    local.REPEAT_S = local.GRACE_S = 900.0  # however busy the machine is
    sys.exit(local.run_group(job, ranks, job.work_dir / "log"))


def end_of(launcher: Forked) -> int | None:
    launcher.communicate(900)
    return launcher.returncode


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(folder: Path) -> list[int]:
    """Process ids of the ranks that still run, without zombies."""

    def running(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [int(pid) for file in folder.glob("pids-?") for pid in file.read_text().split() if running(pid)]


def test_ranks_start_in_a_current_folder_that_cannot_be_entered(make_job, tmp_path):
    job = dataclasses.replace(make_job("sys.exit(3)"), work_dir=tmp_path / "none")
    assert local.run_group(job, 1, tmp_path / "log") == 3


def test_the_first_failing_rank_decides_and_no_rank_remains(make_job, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    job = make_job("""
if rank == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that hangs in a collective
print("rank", rank, "is there", flush=True)
ready(); wait_for_all()
if rank == "1":
    sys.exit(7)
time.sleep(100)
""")
    assert local.run_group(job, 3, tmp_path / "log") == 7
    out, err = capfd.readouterr()
    assert "rank 0 is there" in out  # on the console: rank 0 only
    assert "rank 1" not in out
    assert f"error: rank 1 ended with code 7, so the others were stopped; see {tmp_path}/log/rank-1.log" in err
    assert "  rank 1 is there" in err
    ranks = [int((tmp_path / f"pids-{rank}").read_text().split()[0]) for rank in range(3)]
    assert not set(ranks) & set(alive(tmp_path))


def test_a_reason_is_preferred_to_a_lost_connection(make_job, tmp_path, capfd):
    job = make_job('ready(); wait_for_all(); sys.exit(1 if rank == "0" else 65)')
    assert local.run_group(job, 2, tmp_path / "log") in (65, 1)  # both end within one poll, or the crash is seen first
    group = object.__new__(local.Group)
    group._running, group._received, group._last_sent, group.logs = {0: None}, [], {}, []
    ended = [{0: 1, 1: 65}]
    group._newly_ended = lambda: group._running.clear() or ended.pop()
    assert group.wait(lambda: None) == 65


@pytest.mark.parametrize("place", ["lock", "log"])
def test_an_outage_of_the_log_folder_is_a_crash_and_not_the_end(make_job, tmp_path, monkeypatch, place, capfd):
    really_open, failures = open, iter(range(2))

    def open_or_not(path, *arguments, **options):
        if str(path).endswith(f"rank-1.{place}" if place == "log" else ".lock") and next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_or_not)
    monkeypatch.setattr(restart_policy, "PAUSES_S", (0.0, 0.0, 0.0))
    job = make_job("")
    code = local.run_until_done(lambda: local.run_group(job, 2, tmp_path / "log"), tmp_path)
    assert code == 0
    assert capfd.readouterr().err.count("cannot be used: Stale file handle") == 2


def test_a_disk_without_space_for_the_log_is_named(make_job, tmp_path):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    (log_dir / "rank-1.log").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^log folder .*/log: cannot be used: No space left on device$") as error:
        local.run_group(make_job(""), 2, log_dir)
    assert error.value.exit_code == EXIT_STORAGE


def test_a_config_whose_name_is_not_utf8_is_named_in_the_log(make_job, tmp_path):
    job = dataclasses.replace(make_job(""), overrides=(os.fsdecode(b"name=\xff"),))
    assert local.run_group(job, 1, tmp_path / "log") == 0
    assert b"name=\xff" in (tmp_path / "log" / "rank-0.log").read_bytes()


@pytest.mark.parametrize("first", [0, 1])
def test_a_process_that_cannot_be_started_is_a_crash_and_signals_arrive_afterwards(
    make_job, tmp_path, monkeypatch, first, capfd
):
    really_fork, calls = os.fork, iter(range(99))

    def fork_or_not():
        if next(calls) == first:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return really_fork()

    monkeypatch.setattr(os, "fork", fork_or_not)
    monkeypatch.setattr(restart_policy, "PAUSES_S", (0.0, 0.0, 0.0))
    job = make_job("")
    assert local.run_until_done(lambda: local.run_group(job, 2, tmp_path / "log"), tmp_path) == 0
    said = capfd.readouterr().err
    assert said.count("a process for a rank cannot be started: Resource temporarily unavailable; raise the limit") == 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_killed_rank_gives_the_shells_code_and_logs_are_appended(make_job, tmp_path, capfd):
    job = make_job('os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else time.sleep(100)')
    assert local.run_group(job, 2, tmp_path / "log") == 137
    assert local.run_group(job, 2, tmp_path / "log") == 137
    said = "error: rank 1 ended with code 137: SIGKILL killed it (the kernel sends it if memory runs out, and `dmesg`"
    assert said in capfd.readouterr().err
    lines = (tmp_path / "log" / "rank-0.log").read_text().splitlines()
    assert [line[:5] for line in lines] == ["--- 2"] * 2
    assert all(line.endswith(f"bfsys/train.py {tmp_path}/c.yaml a=1") for line in lines)


def test_the_launcher_waits_for_all_ranks_after_an_agreed_error(make_job, tmp_path, capfd):
    job = make_job('time.sleep(0.5 * int(rank)); print("closed", flush=True); sys.exit(2)')
    assert local.run_group(job, 2, tmp_path / "log") == 2
    assert "closed" in (tmp_path / "log" / "rank-1.log").read_text()
    assert "error" not in capfd.readouterr().err  # rank 0 has already printed the error


def test_signals_reach_each_rank_once(make_job, tmp_path):
    job = make_job("""
received = []
signal.signal(signal.SIGUSR2, lambda *_: received.append("USR2"))
ready()
while not received:
    time.sleep(0.02)
time.sleep(0.5)
print(*received)
sys.exit(75)
""")
    launcher = launch(job, 2)
    for _ in range(3):  # like a signal to a whole process group, whose members forward it
        launcher.send_signal(signal.SIGUSR2)
        time.sleep(0.06)
    assert end_of(launcher) == 75
    for rank in range(2):
        assert (tmp_path / "log" / f"rank-{rank}.log").read_text().splitlines()[1:] == ["USR2"]


def test_a_stop_while_a_rank_dies_is_a_stop(make_job, tmp_path):
    """Otherwise the crash would restart the run, and the request would be lost."""
    job = make_job("""
if rank == "1":
    ready(); wait_for_all(); sys.exit(1)
def stop(*_):
    open("stopping", "w").close()
    while not os.path.exists("asked"):
        time.sleep(0.02)
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
ready(); time.sleep(100)
""")
    launcher = launch(job, 2)
    wait_until((tmp_path / "stopping").exists, 900)  # rank 1 has ended, and rank 0 is being stopped
    launcher.send_signal(signal.SIGTERM)
    (tmp_path / "asked").touch()
    assert end_of(launcher) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_training_has_begun_is_a_stop_without_a_traceback(make_job, tmp_path, number):
    launcher = launch(make_job("ready(); time.sleep(100)"), 2)
    launcher.send_signal(number)
    assert end_of(launcher) == 130
    assert len((tmp_path / "log" / "rank-0.log").read_text().splitlines()) == 1  # the command


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGUSR2, 75)])
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), {})", "sys.exit(128 + {})"])
def test_a_stop_signal_to_a_rank_that_does_not_listen_is_a_stop(make_job, tmp_path, number, code, end):
    """A rank handles signals from its first step to its last. As a command that begins, it ends with the shell's
    code."""
    job = make_job(f"""
ready(); wait_for_all()
if rank == "1":
    {end.format(int(number))}
time.sleep(100)
""")
    assert local.run_group(job, 2, tmp_path / "log") == code


def test_a_second_launcher_does_not_show_what_the_first_ones_ranks_say(make_job, tmp_path, monkeypatch, capfd):
    job = make_job('ready(); print("of the first", flush=True); time.sleep(100)')
    launcher = launch(job, 2)
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.3)
    with pytest.raises(UserError, match=f"run directory {tmp_path}: another process is training in it"):
        local.run_group(job, 2, tmp_path / "log")
    assert "of the first" not in capfd.readouterr().out
    launcher.send_signal(signal.SIGTERM)
    assert end_of(launcher) == 130


def test_a_killed_launcher_leaves_no_ranks(make_job, tmp_path):
    launcher = launch(make_job("signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(100)"), 2)
    ranks = {int((tmp_path / f"pids-{rank}").read_text().split()[0]) for rank in range(2)}
    launcher.kill()
    wait_until(lambda: not ranks & set(alive(tmp_path)), 900)


def test_choice_of_ranks(monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 6)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [local.choose_ranks(lanes, None) for lanes in (1, 4, 9, 12, 64)] == [1, 4, 3, 6, 4]
    assert local.choose_ranks(64, range(32, 33)) == 32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert local.choose_ranks(64, None) == 2
    for asked, said in ((3, "world sizes that fit: 1, 2, 4"), (4, "this machine's 3 GPUs")):
        with pytest.raises(UserError, match=said):
            local.choose_ranks(4, range(asked, asked + 1))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local.choose_ranks(4, range(4, 5)) == 4


def test_a_start_after_a_killed_rank_uses_fewer_ranks_of_the_range(config_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "usable_cores", lambda: 6)
    monkeypatch.setattr(local.time, "sleep", lambda s: None)
    codes, started = [], []

    def run_group(job: TrainJob, ranks: int, log_dir: Path) -> int:
        started.append(ranks)
        return codes.pop(0)

    monkeypatch.setattr(local, "run_group", run_group)
    for asked, ends, ranks in (
        ("1-6", [137, 1, 137, 0], [4, 2, 2, 1]),  # a crash does not reduce the ranks
        ("2-6", [137, 137, 0], [4, 2, 2]),
        ("4", [137, 0], [4, 4]),
        (None, [137, 0], [4, 4]),
    ):
        codes[:] = ends
        started.clear()
        assert local.launch(load_config(config_file), config_file, (), local.parse_ranks(asked), is_dry_run=False) == 0
        assert started == ranks
    assert "ranks: 2 on the CPU" in capfd.readouterr().out


def test_too_few_threads_for_all_ranks_are_an_error_before_the_first_start(config_file, monkeypatch):
    monkeypatch.setattr(rendezvous, "threads_that_start", lambda wanted: min(wanted, 12))
    monkeypatch.setattr(local, "run_group", lambda job, ranks, log_dir: 0)
    config = load_config(config_file)
    assert local.launch(config, config_file, (), range(1, 2), is_dry_run=False) == 0
    with pytest.raises(UserError, match=r"at least 16 more processes and threads.* allows 12 more; raise .*pids.max"):
        local.launch(config, config_file, (), range(2, 3), is_dry_run=False)


def test_dry_run_starts_nothing(config_file, tmp_path, capsys):
    assert call("launch", ["--ranks", "2", str(config_file), "train.steps=5", "--dry-run"]) == 0
    assert f"{LAUNCHER.parents[1]}/bfsys/train.py {config_file} train.steps=5, 2 times" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def starts(run: Path, *ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[float]]:
    """Return the exit code of a run whose starts end with (code, newest step), and the pauses between them."""
    remaining, pauses = list(ends), []

    def start() -> int:
        code, step = remaining.pop(0)
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
        return code

    monkeypatch.setattr(local.time, "sleep", lambda s: pauses.append(s))
    code = local.run_until_done(start, run)
    assert not remaining
    return code, pauses


def test_a_repeated_request_ends_at_once_only_if_a_user_makes_it(make_job, tmp_path, monkeypatch):
    """A SLURM job gets a second SIGTERM at the end of its grace time, while it may still write a checkpoint."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = make_job("""
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append("TERM"))
ready()
while not received:
    time.sleep(0.02)
open("received", "w").close()
while len(received) < 2:
    time.sleep(0.02)
time.sleep(1)
sys.exit(130)
""")
    monkeypatch.setattr(local, "GRACE_S", 0.1)
    monkeypatch.setattr(local, "REPEAT_S", 0.05)
    group = local.Group(job, 1, prepared(tmp_path / "log"))
    wait_until((tmp_path / "pids-0").exists, 900)

    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until((tmp_path / "received").exists, 900)
        time.sleep(0.1)  # more than REPEAT_S
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_twice).start()
    try:
        assert group.wait(lambda: None) == 130
    finally:
        group.close()


def prepared(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("code", [0, 2, 65, 74, 75, 130])
def test_an_end_that_another_start_would_not_change_is_the_end(tmp_path, monkeypatch, code):
    assert starts(tmp_path, (code, 4), monkeypatch=monkeypatch) == (code, [])


def test_crashes_are_started_again_while_there_is_progress(tmp_path, monkeypatch):
    code, pauses = starts(tmp_path, (137, 4), (70, 8), (1, 8), (1, 12), (0, 20), monkeypatch=monkeypatch)
    assert (code, pauses) == (0, [0, 0, 10, 0])


def test_three_starts_again_without_progress_are_enough(tmp_path, monkeypatch, capfd):
    code, pauses = starts(tmp_path, (1, 4), (1, 4), (70, 4), (137, 4), monkeypatch=monkeypatch)
    assert (code, pauses) == (EXIT_NO_PROGRESS, [0, 10, 60])
    assert "without a new checkpoint" in how_it_ended(tmp_path)["reason"]
    assert "gave up after 3 restarts without a new checkpoint" in capfd.readouterr().err


def test_training_survives_a_killed_rank_and_its_terminal_and_continues_to_its_end(config_file, tmp_path):
    """First a rank is killed. Then the console is closed and SIGHUP is sent, like at the end of a terminal."""
    run = tmp_path / "runs" / "tiny"
    command = [sys.executable, LAUNCHER, "--ranks", "2", config_file, "train.steps=100000", "train.save_every=5"]
    command += ["train.micro_batch_tokens=1000"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, killed = [], None
    for line in launcher.stdout:
        said.append(line)
        if killed is None and "saved" in line:
            processes = psutil.Process(launcher.pid).children()
            (killed,) = [p for p in processes if p.name() == "bfsys rank 1"]
            killed.kill()
        elif line.startswith("step ") and any(earlier.startswith("restarting") for earlier in said):
            launcher.stdout.close()
            break
    wait_until(lambda: lines(run)[-1]["step"] >= 15, 900)
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(timeout=900) == 130, "".join(said)
    assert any(line.startswith("restarting in 0 s from step ") for line in said)
    log = (run / "log" / "rank-0.log").read_text()
    stopped = int(log.partition("stopped on request after step ")[2].partition(";")[0])
    assert stopped >= 15
    assert (run / "checkpoints" / "latest").read_text() == f"step_{stopped:08}\n"
    assert how_it_ended(run)["exit_code"] == 130

    last = stopped + 5
    again = Forked(run_python, [*map(str, command[1:]), f"train.steps={last}"], {})
    out, err = again.communicate(timeout=900)
    assert again.returncode == 0, out + err
    assert f"continuing {run} after step {stopped}\n" in out
    assert f"finished: {last} steps" in out
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last:08}\n"
    assert [line["step"] for line in lines(run)] == list(range(1, last + 1))
    assert (run / "log" / "rank-1.log").read_text().count("--- 2") == 3
    assert how_it_ended(run)["exit_code"] == 0
    seconds = read_seconds(run)
    assert seconds["restart"] > 0
    assert seconds["lost"] > 0
