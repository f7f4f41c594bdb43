"""Train on this machine: one process per GPU, or several on the CPU. restart_policy.py says when a run is restarted.

Ranks write to files, and this process shows what is added to rank 0's file. So no rank waits for a console or fails
with it. If the launcher is killed, its ranks are killed too (processes.py), and only the steps since the last
checkpoint are lost.
"""

from __future__ import annotations

import codecs
import errno
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TypeVar

import psutil

from bfsys.config import Config
from bfsys.data.streaming.plan import lanes_of_rank
from bfsys.dryrun import dry_run
from bfsys.errors import (
    EXIT_CRASHED,
    EXIT_HUNG,
    EXIT_REQUEUE,
    EXIT_STOPPED,
    EXIT_STORAGE,
    UserError,
    cannot_start,
    code_of,
    collecting,
    counted,
    error_line,
)
from bfsys.launch.elastic import MOST, describe, fitting, parse_range
from bfsys.launch.job import CODE_DIR, TrainJob, free_port, rank_variables
from bfsys.launch.processes import Process, fork_rank, import_what_ranks_need, start_program
from bfsys.launch.restart_policy import FINAL_CODES, Restarts, newest_step
from bfsys.locations import hide_in
from bfsys.process import end_of, handling, usable_cores
from bfsys.ranks import gpu_count
from bfsys.rendezvous import check_threads
from bfsys.run_dir import hold_directory
from bfsys.supervision.goodput import STARTED
from bfsys.supervision.run_end import how_it_ended, note_end
from bfsys.supervision.signals import EXIT_CODES, REPEAT_S, ends_at_once, stop_signals

T = TypeVar("T")

AGREED_CODES = (*FINAL_CODES, EXIT_REQUEUE)  # all ranks end with such a code, at nearly the same time
KILLED = 128 + signal.SIGKILL  # exit code of a rank that was killed
START_ERRNOS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}  # a process cannot be started
POLL_S = 0.05
TOGETHER_S = 30.0  # after the end of the first rank, until the others are stopped
GRACE_S = 10.0  # between SIGTERM and SIGKILL
SHOWN_LINES = 15  # last lines of a failed rank's log


class Group:
    """The running ranks of one job, until all of them have ended."""

    def __init__(self, job: TrainJob, world_size: int, log_dir: Path) -> None:
        self._running: dict[int, Process] = {}  # processes by rank that have not ended
        self.logs = [log_dir / f"rank-{rank}.log" for rank in range(world_size)]
        self._received: list[int] = []
        self._last_sent: dict[int, float] = {}
        self._previous = {number: signal.signal(number, self._receive) for number in stop_signals()}
        start: Callable[[TrainJob, int, dict[str, str], Path], Process] = start_program
        if not gpu_count():
            import_what_ranks_need()
            start = fork_rank
        port = free_port()
        try:
            for rank, log in enumerate(self.logs):
                variables = rank_variables(
                    rank, world_size, rank, world_size, master_addr="127.0.0.1", master_port=port
                )
                with open(log, "ab") as output:
                    output.write(os.fsencode(f"--- {time.strftime('%F %T')} {hide_in(shlex.join(job.command()))}\n"))
                self._running[rank] = start(job, rank, {**os.environ, **variables}, log)
        except OSError:
            self.close()
            raise

    def wait(self, show: Callable[[], None]) -> int:
        """Wait for all ranks, forward signals, and stop the others if one fails. Returns the exit code of the run.

        `show` is called repeatedly.
        """
        first_rank = first_code = 0
        end_at, end_by = math.inf, signal.SIGTERM  # when and how the other ranks are ended
        while self._running:
            time.sleep(POLL_S)
            gave_up = self._forward()
            ended = self._newly_ended()
            show()
            now = time.monotonic()
            if first_code == 0 and any(ended.values()):
                first_rank, code = likeliest_cause(ended)
                first_code = self._exit_code(code, was_told=end_by == signal.SIGKILL)
            if first_code == EXIT_HUNG:  # a hung rank does not react to SIGTERM
                end_at, end_by = now, signal.SIGKILL
            elif end_by == signal.SIGTERM and (gave_up or first_code not in AGREED_CODES):
                end_at = now
            elif end_by == signal.SIGTERM and ended:
                end_at = min(end_at, now + TOGETHER_S)
            if now >= end_at:
                self._send(end_by)
                end_at, end_by = now + GRACE_S, signal.SIGKILL
        if first_code not in AGREED_CODES:
            self._describe_failure(first_rank, first_code)
            for number in (*self._last_sent, *self._received):  # a stop was requested: no restart
                return EXIT_CODES[number]
        return first_code

    def close(self) -> None:
        """Kill all remaining processes."""
        self._send(signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _newly_ended(self) -> dict[int, int]:
        """The exit codes of the ranks that have ended since the last call."""
        ended = {rank: code for rank, process in self._running.items() if (code := process.poll()) is not None}
        for rank in ended:
            del self._running[rank]
        return ended

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _forward(self) -> bool:
        """Forward each received signal once. Returns True if a repeated signal means that ranks must end at once."""
        gave_up = False
        while self._received:
            number, now = self._received.pop(0), time.monotonic()
            last = self._last_sent.get(number)
            if last is not None and now - last < REPEAT_S:
                continue
            self._last_sent[number] = now
            gave_up |= last is not None and ends_at_once(number)
            self._send(number)
        return gave_up

    def _send(self, number: int) -> None:
        for process in self._running.values():
            if number == signal.SIGKILL:
                with suppress(ProcessLookupError):  # the rank and its loader processes
                    os.killpg(process.pid, number)
            process.send_signal(number)  # no effect if it has ended

    def _exit_code(self, code: int, *, was_told: bool) -> int:
        """Return the exit code for a rank. A rank that was ended by a stop signal had nothing to save. It gets the
        code of a stop, and the signal is forwarded. This does not apply if this process sent the signal
        (`was_told`)."""
        if code != EXIT_STOPPED and code - 128 in EXIT_CODES:  # before it lets signals kill it (commands/train.py)
            code = 128 - code
        if code >= 0:
            return code
        if -code in self._last_sent:
            return EXIT_CODES[-code]
        if was_told or -code not in EXIT_CODES:
            return 128 - code
        self._received.append(-code)
        return EXIT_CODES[-code]

    def _describe_failure(self, rank: int, code: int) -> None:
        log = self.logs[rank]
        print(f"error: rank {rank} {end_of(code)}, so the others were stopped; see {log}", file=sys.stderr)
        if rank:  # rank 0's lines are already shown
            with suppress(OSError):
                lines = log.read_text(errors="replace").splitlines()
                print("\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]), file=sys.stderr)


def likeliest_cause(ended: dict[int, int]) -> tuple[int, int]:
    """(rank, code) of the rank that failed first. If several have failed, it is rather one that was killed by a signal,
    or else one that names its reason: the others crash because they lose the connection to it."""
    return min(
        ((rank, code) for rank, code in ended.items() if code),
        key=lambda failed: (failed[1] > 0, failed[1] == EXIT_CRASHED, failed[1], failed[0]),
    )


def run_group(job: TrainJob, world_size: int, log_dir: Path) -> int:
    """Run all ranks to their end, with rank 0's output on the console. Returns the exit code of the run.

    Raises UserError if another launcher writes to these logs.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        # Ranks lock the run directory later. Until then, two launchers would show the output of each other's rank 0.
        hold = hold_directory(log_dir.parent, f"{log_dir.name}/.lock")
    except OSError as error:
        raise _log_error(log_dir, error) from None
    with hold:
        try:
            shown = open(log_dir / "rank-0.log", "ab+")  # noqa: SIM115 (below); it is read from its present end
            group = Group(job, world_size, log_dir)
        except OSError as error:
            raise _log_error(log_dir, error) from None
        try:
            with shown:
                decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
                code = group.wait(lambda: show_new(shown, decoder))
                show_new(shown, decoder)
        finally:
            group.close()
    return code


def _log_error(log_dir: Path, error: OSError) -> UserError:
    if error.filename is None and error.errno in START_ERRNOS:  # writing sets no file name either
        return cannot_start("a process for a rank", error)
    return UserError(f"log folder {log_dir}: cannot be used: {error.strerror}", exit_code=code_of(error))


def run_until_done(start: Callable[[], int], run_dir: Path) -> int:
    """Call `start()`, which returns the run's exit code, and restart as the policy says. Returns the last code."""
    restarts = Restarts(run_dir, newest_step(run_dir))

    def stop(number: int, frame: FrameType | None) -> None:
        note_end(run_dir, EXIT_CODES[number], "stopped on request between two starts")
        print("stopped on request", file=sys.stderr)
        sys.exit(EXIT_CODES[number])

    def attempt() -> int:
        try:
            return start()
        except UserError as error:
            if error.exit_code in FINAL_CODES:
                raise
            print(*map(error_line, error.problems), sep="\n", file=sys.stderr, flush=True)
            return error.exit_code

    while (code := attempt()) != EXIT_REQUEUE and (pause_s := restarts.pause_s(code)) is not None:
        print(f"restarting in {pause_s:.0f} s from step {restarts.step}", file=sys.stderr, flush=True)
        with handling(stop_signals(), stop):
            time.sleep(pause_s)
    if code == EXIT_STORAGE and not how_it_ended(run_dir):  # the logs of the ranks cannot be written either
        problem = f"training ended with code {code}: {run_dir} cannot be written, and the reason could not be recorded"
        print(f"error: {problem} there; is its disk full or read-only?", file=sys.stderr)
    return code if code == EXIT_REQUEUE else restarts.exit_code


def show_new(log: BinaryIO, decoder: codecs.IncrementalDecoder) -> None:
    """Print the new part of the log. The decoder keeps an incomplete character for the next call."""
    try:
        text = decoder.decode(log.read())
    except OSError:  # the ranks may still be training
        return
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def share_of(things: Sequence[T], slot: int, at_once: int) -> list[T]:
    """Return the GPUs or cores of one of `at_once` concurrent runs: an equal share, and at least one."""
    each = max(1, len(things) // at_once)
    return [things[(slot * each + i) % len(things)] for i in range(each)]


def choose_ranks(lanes: int, asked: range | None, at_once: int = 1) -> int:
    """Return the requested number of ranks. From a range, and by default, choose the largest number that the GPUs or
    cores allow and that divides the lanes. Concurrent runs share the GPUs or cores equally. Raises UserError."""
    gpus = gpu_count()
    each = len(share_of(range(gpus or usable_cores()), 0, at_once))
    there = counted(each, "GPU" if gpus else "core")
    if asked is None:
        return fitting(lanes, range(1, each + 1))[-1]
    if len(asked) > 1:
        if fit := fitting(lanes, range(asked.start, min(asked.stop, each + 1))):
            return fit[-1]
        raise UserError(
            f"--ranks: got {describe(asked)}; {counted(lanes, 'lane')} (data.lanes) and {there} allow "
            f"{', '.join(map(str, fitting(lanes, range(1, each + 1))))}"
        )
    (number,) = asked
    problems: list[str] = []
    with collecting(problems):
        lanes_of_rank(lanes, 0, number)
    if gpus and number > each:
        whose = f"this machine's {there}" if at_once == 1 else f"the {there} of each of {at_once} runs"
        problems.append(f"--ranks: got {number}, more than {whose}; one rank per GPU is allowed")
    if problems:
        raise UserError(*problems)
    return number


def parse_ranks(text: str | None) -> range | None:
    if text is None:
        return None
    if (asked := parse_range(text)) is None:
        raise UserError(
            f"--ranks: got {text!r}; N or MIN-MAX is allowed, for example 4 or 1-4, from 1 to {MOST:,}, MIN first"
        )
    return asked


def launch(
    config: Config, config_file: Path, overrides: Sequence[str], asked: range | None, *, is_dry_run: bool
) -> int:
    """Train on `asked` ranks, or on as many as possible, with restarts. Returns the exit code.

    `config` is read from `config_file` and `overrides`. If `asked` is a range, a start after a rank was killed uses a
    smaller number: the kernel kills a rank if memory is short, and would do so again.
    """
    ranks = choose_ranks(config.data.lanes, asked)
    job = TrainJob(
        config=config_file.absolute(),
        overrides=tuple(overrides),
        code_dir=CODE_DIR,
        work_dir=Path.cwd(),
    )
    log_dir = config.run_dir.absolute() / "log"
    if is_dry_run:
        dry_run(config, ranks, with_data=True)
        print(f"command     {hide_in(shlex.join(job.command()))}, {ranks} times; logs in {log_dir}")
        return 0
    check_threads(ranks, computing=1)
    os.environ[STARTED] = str(psutil.Process().create_time())

    def start() -> int:
        nonlocal ranks, asked
        if asked and len(asked) > 1:
            ranks = choose_ranks(config.data.lanes, asked)
        gpus = gpu_count()
        print(f"ranks: {ranks} on {counted(gpus, 'GPU') if gpus else 'the CPU'}; logs in {log_dir}", flush=True)
        code = run_group(job, ranks, log_dir)
        if code == KILLED and asked and (fewer := fitting(config.data.lanes, range(asked.start, ranks))):
            asked = range(asked.start, fewer[-1] + 1)
            ranks = fewer[-1]
        return code

    return run_until_done(start, config.run_dir)
