"""The jobs of a run, after their submission: how they are, what they say, and how to stop them.

SLURM is asked itself. submitit's own states are final where SLURM's are not: a job that was pre-empted or lost a node
is done for it, and comes back.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bfsys import console
from bfsys.checkpoint.files import METRICS
from bfsys.compare import last_train_line
from bfsys.config import load_config
from bfsys.errors import UserError
from bfsys.json_lines import read_json_lines
from bfsys.launch.restart_policy import newest_step
from bfsys.launch.slurm_commands import ask, fields_of
from bfsys.supervision.goodput import goodput, read_seconds
from bfsys.supervision.run_end import how_it_ended

JOBS = "jobs.jsonl"
POLL_S, STATE_POLL_S = 1.0, 15.0  # intervals for a log, and for SLURM, which many users ask
SHOWN_LINES = 20
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT", "unknown to SLURM"}  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """A job as it was handed to SLURM."""

    job: str
    """The number of the job; NUMBER_TASK in an array."""
    log: str
    """The log of rank 0."""
    time: str
    command: str


def slurm_folder(run_dir: Path) -> Path:
    """Logs, pickles and code of a run's jobs."""
    return run_dir / "slurm"


def note_submission(run_dir: Path, submitted: Submitted) -> None:
    folder = slurm_folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / JOBS, "a") as file:
        file.write(json.dumps(asdict(submitted)) + "\n")


def submissions(run_dir: Path) -> list[Submitted]:
    """The jobs of a run, the last one last."""
    names = [field.name for field in fields(Submitted)]
    lines = read_json_lines(slurm_folder(run_dir) / JOBS, dict.fromkeys(names, str))
    return [Submitted(**{name: line[name] for name in names}) for line in lines]


@dataclass(frozen=True)
class State:
    """The state of a job according to SLURM."""

    name: str
    facts: str = ""

    @property
    def is_over(self) -> bool:
        return self.name in OVER


UNKNOWN = State("unknown to SLURM")
NO_ANSWER = State("SLURM does not answer")


def state_of(job: str) -> State:
    """The state of a job in the queue or, after it has left the queue, in SLURM's accounting if the site has it."""
    answer = ask("scontrol", "--oneliner", "show", "job", job)
    facts = fields_of(answer.output)
    if name := facts.get("JobState"):
        start, end = (facts.get(key, "").replace("T", " ") for key in ("StartTime", "EndTime"))
        shown = {
            "PENDING": f"waits ({facts.get('Reason')}), expected to start {start}",
            "RUNNING": f"for {facts.get('RunTime')} of {facts.get('TimeLimit')} on {facts.get('NodeList')}",
        }.get(name, f"ended {end}" if name in OVER else "")
        restarts = int(facts.get("Restarts", 0))
        return State(name, shown + (f", started again {restarts} times" if restarts else ""))
    if not answer.is_good and "Invalid job id" not in answer.errors:
        return NO_ANSWER
    answer = ask("sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job, "--format=State,End")
    if lines := answer.output.strip().splitlines():
        name, _, end = lines[-1].partition("|")
        return State(name.split()[0].rstrip("+"), f"ended {end.replace('T', ' ')}")
    return UNKNOWN


def active(run_dir: Path) -> list[Submitted]:
    """The run's jobs that wait or run."""
    return [submitted for submitted in submissions(run_dir) if not state_of(submitted.job).is_over]


def show_status(run_dir: Path) -> int:
    """Print how a run is: in the queue, in its training, and what its next step is. 0 unless it has failed."""
    submitted = submissions(run_dir)
    ended, failed = how_it_ended(run_dir), False
    waiting = [(job, state) for job in submitted if not (state := state_of(job.job)).is_over]
    for job, state in waiting or [(job, state_of(job.job)) for job in submitted[-1:]]:
        print(f"job      {job.job}: {f'{state.name} {state.facts}'.strip()}, submitted {job.time}")
        print(f"log      {job.log}")
    if not submitted:
        print("job      none was submitted from here")
    print(f"step     {_progress(run_dir)}")
    seconds = read_seconds(run_dir)
    if sum(seconds.values()):
        causes = ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
        print(f"goodput  {goodput(seconds):.1%} ({causes})")
    if ended and not waiting:
        print(f"ended    {ended['reason']} (code {ended['exit_code']}) {ended['time']}")
        failed = ended["exit_code"] != 0
    elif not waiting and submitted:
        failed = True
        log = Path(submitted[-1].log)
        why = "its log says why" if log.exists() else "it left no log: do the nodes see its folder?"
        print(f"ended    training exited without recording why; {why}")
    if failed and not waiting:
        print("next     fix the cause, then run this command again; it resumes from the newest checkpoint:")
        print(f"         {submitted[-1].command}" if submitted else "")
    return int(failed and not waiting)


def _progress(run_dir: Path) -> str:
    steps = "?"
    with suppress(UserError):
        steps = f"{load_config(run_dir / 'config.yaml').train.steps:,}"
    last = last_train_line(run_dir / METRICS)
    saved = f"newest checkpoint {newest_step(run_dir):,}"
    if not last:
        return f"training has not begun; {saved}"
    age = max(0.0, time.time() - (run_dir / METRICS).stat().st_mtime)
    return f"{last['step']:,} of {steps}, {age:,.0f} s ago; {saved}"


def show_log(run_dir: Path, rank: int, follow: bool) -> int:
    """Print the end of a rank's log of the newest job, and with `follow` what is added to it, until the job is over."""
    submitted = submissions(run_dir)
    if not submitted:
        raise UserError(f"{run_dir}: no job was submitted for this run; its logs, if any, are in {run_dir / 'log'}")
    job = (active(run_dir) or submitted)[-1]
    log = Path(job.log)
    log = log.with_name(log.name.replace("_0_log", f"_{rank}_log"))
    if not log.exists() and not follow:
        raise UserError(f"{log}: not there (yet); the job: {state_of(job.job).name}")
    try:
        for text in _added_to(log, job.job) if follow else (_shown(_last_lines(log, SHOWN_LINES)),):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\nthe job continues; bfsys slurm stop {run_dir} ends it", file=sys.stderr)
    return 0


def follow(run_dir: Path) -> int:
    """Show rank 0's log until the job is over; the code that training ended with, 1 if it never got to it."""
    show_log(run_dir, 0, follow=True)
    if active(run_dir):  # a person has stopped following
        return 0
    ended = how_it_ended(run_dir)
    return ended["exit_code"] if ended else 1


def _added_to(log: Path, job: str) -> Iterator[str]:
    """The log's last lines, and then what comes, until the job is over."""
    while not log.exists():
        if state_of(job).is_over:
            raise UserError(f"job {job}: {state_of(job).name}, and it has left no {log}")
        time.sleep(STATE_POLL_S)
    with open(log, errors="replace") as file:
        yield "".join(deque(file, SHOWN_LINES))
        while True:
            is_over = state_of(job).is_over
            until = time.monotonic() + STATE_POLL_S
            while not is_over and time.monotonic() < until:
                yield file.read()
                time.sleep(POLL_S)
            if is_over:
                yield file.read()
                return


def _shown(lines: list[bytes]) -> str:
    return b"\n".join(lines).decode(errors="replace")


def _last_lines(path: Path, number: int) -> list[bytes]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1000 * number))
        return file.read().splitlines()[-number:]


def stop(run_dir: Path) -> int:
    """Ask SLURM to end the run's jobs, for good. Training saves first, if it gets to it within KillWait."""
    jobs = active(run_dir)
    if not jobs:
        raise UserError(f"{run_dir}: this run has no pending or running job")
    console.go_on_without()  # all of them are to end, whoever reads what is printed
    for submitted in jobs:
        answer = ask("scancel", submitted.job)
        if not answer.is_good:
            raise UserError(f"scancel {submitted.job}: {answer.errors.strip()}")
        print(f"job {submitted.job}: asked to save and to end; see bfsys slurm status {run_dir}")
    return 0
