"""Copies of a run's checkpoints in an object store: they are made in the background, and fetched at a start.

The checkpoints in the run directory are the originals. A checkpoint is copied after it is complete there, by a separate
process (copier.py), so no step waits for the store. The newest checkpoint without a copy is always next. If the store
is slower than the saves, it gets fewer checkpoints, and no queue grows. A failing store does not end training: the next
save tries again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from bfsys import dist
from bfsys.checkpoint import copier
from bfsys.checkpoint.child import start_child
from bfsys.checkpoint.files import MANIFEST, all_checkpoints, checkpoint_name, checkpoints_dir, take_over
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.errors import EXIT_CRASHED, UserError, cannot_start
from bfsys.process import end_of

POLL_S = 0.05
TRIES_AGAIN = "training continues, and the next save tries again"


class Copies:
    """Copies the checkpoints of a run, one at a time; for rank 0.

    It is idle, or it makes one copy (`_present`). An idle one starts a copy only if a checkpoint is offered. After a
    copy the next one starts at once, but after a failed copy only if a checkpoint was offered meanwhile. A process that
    cannot be started is a failed copy.
    """

    def __init__(self, run_dir: Path, url: str, keep: RetentionPolicy) -> None:
        """`url` is the URL of the run in the store."""
        self.run_dir, self.url, self.keep = run_dir, url, keep
        self.problem = ""
        """Why the last copy failed; empty if it did not."""
        self._present: _Copy | None = None
        self._done: dict[_Key, dict] = {}  # the answers about checkpoints that are not tried again
        self._said: Literal["", "copied", "note", "failing"] = ""  # what the last message about the store was
        self._unsaid = ""  # a message for `attend` to return once no copy is made

    def offer(self) -> None:
        """Look for checkpoints without a copy, and start to copy them."""
        if self._present:
            self._present.is_offered_next = True
        else:
            self._start_next()

    def attend(self) -> str:
        """Start the next copy if the present one has ended. Returns a message for the console; empty if nothing has
        changed."""
        if self._present is None:
            news, self._unsaid = self._unsaid, ""
            return news
        if is_running(self._present.process):
            return ""
        ended, self._present = self._present, None
        news = self._take(ended.key, _answer_of(ended.process))
        if not self.problem or ended.is_offered_next:
            self._start_next()
        return news

    @property
    def copying(self) -> Path | None:
        """The checkpoint that is being copied, which must not be removed; None if no copy is made."""
        return self._present.path if self._present else None

    def problem_of_newest(self) -> str:
        """Why the newest checkpoint has no copy; empty if it has one, or was left out on purpose."""
        newest = all_checkpoints(self.run_dir)[-1]
        answer = self._done.get(_key(newest))
        problem = answer.get("damaged", "") if answer is not None else self.problem or "the store was too slow"
        return problem and f"checkpoint {newest}: is intact, but has no copy in {self.url}: {problem}"

    @property
    def newest_is_left_out(self) -> bool:
        """Whether the newest checkpoint is not copied on purpose, since it was saved after a bad step."""
        return "left_out" in self._done.get(_key(all_checkpoints(self.run_dir)[-1]), {})

    def close(self) -> None:
        """Kill the copying process. The incomplete copy has no manifest, so it does not count."""
        if self._present:
            self._present.process.kill()
            self._present.process.communicate()
        self._present = None

    def _start_next(self) -> None:
        """Start to copy the newest checkpoint that is not done, if there is one."""
        for path in reversed(all_checkpoints(self.run_dir)):
            with suppress(FileNotFoundError):  # it has no manifest, or `bfsys checkpoint prune` has removed it
                key = _key(path)
                if key not in self._done:
                    self._begin(path, key)
                    return

    def _begin(self, path: Path, key: _Key) -> None:
        task = {"action": "copy", "path": str(path), "keep": asdict(self.keep)}
        try:
            self._present = _Copy(_start(self.run_dir, self.url, task), path, key)
        except OSError as error:  # the limit of processes or of memory is reached
            problem = f"the copying process cannot be started: {error.strerror}"
            self._unsaid = self._take(key, {"problem": problem}) or self._unsaid

    def _take(self, key: _Key, answer: dict) -> str:
        """Record the result of a copy. Returns a message; empty if the last one said the same about the store."""
        name, before = key[0], self._said
        self.problem = answer.get("problem", "")
        if not self.problem:
            self._done[key] = answer
        if reason := answer.get("damaged") or answer.get("left_out"):  # says nothing about the store
            return f"{name} is not copied: {reason}"
        if self.problem:
            self._said, news = "failing", f"{name} is not copied: {self.problem}; {TRIES_AGAIN}"
        elif note := answer.get("note"):
            self._said, news = "note", f"{name} is copied, but older copies stay: {note}"
        else:
            again = " again" if before == "failing" else ""
            self._said, news = "copied", f"checkpoints are copied to {self.url}{again}"
        return news if self._said != before else ""


_Key = tuple[str, int]
"""The identity of a checkpoint: its name, and when its manifest was written (ns). It differs from that of another
checkpoint of the same step."""


@dataclass
class _Copy:
    """A copy that is being made."""

    process: subprocess.Popen
    path: Path
    key: _Key
    is_offered_next: bool = False
    """Whether a checkpoint was offered since this copy began."""


@dataclass(frozen=True)
class Wanted:
    """The copies of a run to choose from: those of steps after `after` and, if it is given, up to `until`."""

    run_dir: Path
    url: str
    after: int
    until: int | None = None


def fetch_newest(
    wanted: Wanted, ranks: dist.Ranks, *, check: Callable[[Path], None], wait: Callable[[], None] = lambda: None
) -> Fetched:
    """Fetch the newest intact copy of those in `wanted` into the run directory, on rank 0; collective.

    `check` raises UserError if the checkpoint belongs to another run. `wait` is called repeatedly meanwhile. There is
    no timeout here: the copying process ends by itself if the store does not respond.
    """
    process: subprocess.Popen | None = None

    def begin() -> None:
        nonlocal process
        task = {"action": "fetch", "after": wanted.after, "until": wanted.until}
        try:
            process = _start(wanted.run_dir, wanted.url, task)
        except OSError as error:
            raise cannot_start("the process that fetches checkpoints", error) from None

    dist.on_rank0(begin, ranks)
    while dist.agree_on_max(process is not None and is_running(process))[0]:
        wait()
        time.sleep(POLL_S)

    def finish() -> Fetched:
        assert process is not None
        answer = _answer_of(process)
        notes = [f"skipped a damaged copy: {problem}" for problem in answer.get("skipped", ())]
        notes += [f"skipped a copy: {problem}" for problem in answer.get("unusable", ())]
        if "work" not in answer:
            return Fetched(None, answer.get("problem", ""), answer.get("exit_code", 0), notes)
        work, name = Path(answer["work"]), checkpoint_name(answer["step"])
        try:
            check(work)
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        take_over(work, checkpoints_dir(wanted.run_dir) / name)
        return Fetched(name, "", 0, [*notes, f"fetched {name} from {wanted.url}"])

    return dist.on_rank0(finish, ranks)


class Fetched(NamedTuple):
    """The result of `fetch_newest`."""

    name: str | None
    """The checkpoint that was fetched; None if there is no intact copy."""
    problem: str
    """Why the store could not be read; empty if it could."""
    exit_code: int
    """The exit code for the problem."""
    notes: list[str]


def is_running(process: subprocess.Popen) -> bool:
    """Whether a copying process has not ended. If it was stopped (SIGSTOP), it is continued, because a stopped process
    does not notice that it makes no progress, and would be waited for without limit."""
    process.send_signal(signal.SIGCONT)
    return process.poll() is None


def _start(run_dir: Path, url: str, task: dict) -> subprocess.Popen:
    return start_child([copier.__file__], {"url": url, "run_dir": str(run_dir), **task})


def _answer_of(process: subprocess.Popen) -> dict:
    output, _ = process.communicate()
    try:
        return json.loads(output)
    except ValueError:
        return {"problem": f"the copying process {end_of(process.returncode)}", "exit_code": EXIT_CRASHED}


def _key(path: Path) -> _Key:
    return path.name, (path / MANIFEST).stat().st_mtime_ns
