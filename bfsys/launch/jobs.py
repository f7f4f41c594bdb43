"""The jobs of a run after their submission: their status, their logs, and how to stop them.

The status comes from SLURM and not from submitit. submitit treats a pre-empted job, or one that lost a node, as
finished, although SLURM requeues it.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bfsys import console
from bfsys.checkpoint.files import METRICS
from bfsys.compare import last_train_line
from bfsys.config import load_config
from bfsys.errors import EXIT_REQUEUE, EXIT_STOPPED, UserError, counted, os_errors_as
from bfsys.files import exists, is_dir, read_regular, try_lock
from bfsys.json_lines import read_json_lines
from bfsys.launch.restart_policy import newest_step
from bfsys.launch.slurm_commands import IS_IT_UP, Answer, ask, fields_of
from bfsys.supervision.goodput import goodput, read_seconds
from bfsys.supervision.run_end import how_it_ended, note_end

JOBS = "jobs.jsonl"
POLL_S, STATE_POLL_S = 1.0, 15.0  # intervals between reads of a log and between requests to SLURM
SHOWN_LINES = 20
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT", "unknown to SLURM"}  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted to SLURM."""

    job: str
    """The job id; NUMBER_TASK in an array."""
    log: str
    """The log of rank 0."""
    time: str
    command: str


def slurm_folder(run_dir: Path) -> Path:
    """The folder of the logs, pickles and code of a run's jobs."""
    return run_dir / "slurm"


@contextmanager
def submitting(run_dir: Path) -> Iterator[None]:
    """Lock the run against other submissions. Raises UserError if another one is in progress, or if jobs cannot be
    recorded."""
    path = slurm_folder(run_dir) / JOBS
    with os_errors_as(f"{path}: cannot be written, and each job is recorded there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    with file:
        if not try_lock(file):
            raise UserError(
                f"run directory {run_dir}: another submission of this run is in progress; see bfsys slurm status "
                f"{shlex.quote(str(run_dir))} when it is done"
            )
        yield


def note_submission(run_dir: Path, submitted: Submitted) -> None:
    path = slurm_folder(run_dir) / JOBS
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = exists(path) and read_regular(path)[-1:] not in (b"", b"\n")  # by a kill
    with open(path, "ab") as file:
        file.write(b"\n" * is_torn + json.dumps(asdict(submitted)).encode() + b"\n")


def submissions(run_dir: Path) -> list[Submitted]:
    """The jobs of a run, the oldest first."""
    names = [field.name for field in fields(Submitted)]
    lines = read_json_lines(slurm_folder(run_dir) / JOBS, dict.fromkeys(names, str))
    found = [Submitted(**{name: line[name] for name in names}) for line in lines]
    newest = {submitted.job: submitted for submitted in found}  # SLURM may reuse job ids
    return [submitted for submitted in found if newest[submitted.job] is submitted]


def members(run_dir: Path) -> list[Path]:
    """The runs of a sweep, if `run_dir` only holds their logs and is not a run itself."""
    if submissions(run_dir):
        return []
    folder = slurm_folder(run_dir.absolute())
    others = sorted(run_dir.parent.glob(f"{glob.escape(run_dir.name)}-*"))
    return [other for other in others if any(Path(job.log).parent == folder for job in submissions(other))]


@dataclass(frozen=True)
class State:
    """The state of a job according to SLURM."""

    name: str
    facts: str = ""
    reason: str = ""
    """Why the job waits."""

    @property
    def is_over(self) -> bool:
        return self.name in OVER


UNKNOWN = State("unknown to SLURM")
ANOTHER = State("unknown to SLURM", "(another job has its number now)")
NO_ANSWER = State("SLURM does not answer")


def state_of(submitted: Submitted, *, also_ended: bool = True) -> State:
    """The state of a job in the queue or, after it has left the queue, in SLURM's accounting if the site has it.

    A job is identified by its id and the folder of its files. Ids are reused after MaxJobId and by a new controller,
    and another cluster has the same ones.
    """
    folder, unknown = f"{Path(submitted.log).parent}/", UNKNOWN
    answer = ask("scontrol", "--oneliner", "show", "job", submitted.job)
    facts = fields_of(answer.output)
    if name := facts.get("JobState"):
        if f" StdOut={folder}" in answer.output:
            return _state_in_queue(name, facts)
        unknown = ANOTHER
    elif not answer.is_good and not is_missing(submitted.job, answer):
        return NO_ANSWER
    if also_ended:
        form = "--format=State,End,SubmitLine"
        answer = ask("sacct", "--allocations", "--noheader", "--parsable2", "--jobs", submitted.job, form)
        for line in reversed(answer.output.strip().splitlines()):
            state, end, command = (*line.split("|", 2), "", "")[:3]
            name = (state.split() or [""])[0].rstrip("+")
            if folder in command and name in OVER:  # a running job would be in the queue
                return State(name, f"ended {end.replace('T', ' ')}")
    return unknown


def is_missing(job: str, answer: Answer) -> bool:
    """Whether scontrol says that a job is not in the queue. For a member of an array whose other members are there, it
    says so on its standard output."""
    return "Invalid job id" in answer.errors or f"Job {job} not found" in answer.output + answer.errors


def _state_in_queue(name: str, facts: dict[str, str]) -> State:
    start, end = (facts.get(key, "").replace("T", " ") for key in ("StartTime", "EndTime"))
    shown = {
        "PENDING": f"waits ({facts.get('Reason')}), expected to start {start}",
        "RUNNING": f"for {facts.get('RunTime')} of {facts.get('TimeLimit')} on {facts.get('NodeList')}",
    }.get(name, f"ended {end}" if name in OVER else f"on {facts.get('NodeList')}")
    restarts = facts.get("Restarts", "")
    if restarts.isdecimal() and int(restarts):  # other versions may write another text
        shown += f", started again {counted(int(restarts), 'time')}"
    return State(name, shown, facts.get("Reason", ""))


def active(run_dir: Path) -> list[tuple[Submitted, State]]:
    """The run's pending and running jobs. If SLURM does not answer, only the newest one, with NO_ANSWER."""
    submitted, found = submissions(run_dir), []
    for job in submitted:
        state = state_of(job, also_ended=False)
        if state == NO_ANSWER:
            return [(submitted[-1], NO_ANSWER)]
        if not state.is_over:
            found.append((job, state))
    return found


def show_status(run_dir: Path) -> int:
    """Print the jobs of a run, its progress, and what to do next. Returns 1 if the run has failed, else 0."""
    submitted = submissions(run_dir)
    ended = how_it_ended(run_dir)
    shown = active(run_dir) or [(job, state_of(job)) for job in submitted[-1:]]
    for job, state in shown:
        print(f"job      {job.job}: {f'{state.name} {state.facts}'.strip()}, submitted {job.time}")
        print(f"log      {job.log}")
    if not submitted:
        print("job      none was submitted from here")
    print(f"step     {_progress(run_dir)}")
    seconds = read_seconds(run_dir)
    if sum(seconds.values()):
        causes = ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
        print(f"goodput  {goodput(seconds):.1%} ({causes})")
    is_known = all(state != NO_ANSWER for _, state in shown)
    if is_known and not all(state.is_over for _, state in shown):
        for job, state in shown:
            _tell_what_holds(run_dir, job, state)
        return 0
    failed = is_stopped = False
    if ended:
        print(f"ended    {ended['reason']} (code {ended['exit_code']}) {ended['time']}")
        is_stopped = ended["exit_code"] in (EXIT_STOPPED, EXIT_REQUEUE)
        failed = ended["exit_code"] != 0 and not is_stopped
    elif is_known and submitted:
        has_log = exists(Path(submitted[-1].log))
        is_stopped = shown[-1][1].name == "CANCELLED"
        failed = not is_stopped
        if is_stopped:
            text = f"the job was cancelled {'before the run could save' if has_log else 'before it began'}"
        elif has_log:
            text = "training ended without a recorded reason; its log says why"
        elif shown[-1][1].name == UNKNOWN.name:  # also a member that a user cancelled in a waiting array
            text = "the job wrote no log: it was cancelled before it began, or the nodes cannot see the log's folder"
        else:
            text = "the job wrote no log: check that the nodes can see the log's folder"
        print(f"ended    {text}")
    if is_known and submitted and (failed or is_stopped):
        what = "fix the cause, then run" if failed else "to continue, run"
        print(f"next     {what} this command again; it resumes from the newest checkpoint:")
        print(f"         {submitted[-1].command}")
    return int(failed)


def _tell_what_holds(run_dir: Path, job: Submitted, state: State) -> None:
    """Print what to do about a job that SLURM will not start or continue."""
    if state.reason == "DependencyNeverSatisfied":
        print(f"next     the job can never start: bfsys slurm stop {shlex.quote(str(run_dir))}, then submit it again:")
        print(f"         {job.command}")
    elif "held" in state.reason.lower():  # JobHeldUser, JobHeldAdmin, launch failed requeued held
        print(f"next     the job is held: scontrol release {job.job}")
    elif state.name == "SUSPENDED":
        print(f"next     if no other job has suspended it: scontrol resume {job.job}")


def show_status_of_all(runs: list[Path]) -> int:
    """Print the status of the runs of a sweep. Returns 1 if one has failed, else 0."""
    codes = []
    for run in runs:
        print(f"run      {run}")
        codes.append(show_status(run))
        print()
    return max(codes)


def _progress(run_dir: Path) -> str:
    steps = "?"
    with suppress(UserError):
        steps = f"{load_config(run_dir / 'config.yaml').train.steps:,}"
    last = last_train_line(run_dir / METRICS)
    newest = newest_step(run_dir)
    saved = f"newest checkpoint {newest:,}"
    if not last:
        return f"{'no step is logged yet' if newest else 'training has not begun'}; {saved}"
    age = max(0.0, time.time() - (run_dir / METRICS).stat().st_mtime)
    return f"{last['step']:,} of {steps}, {age:,.0f} s ago; {saved}"


def show_log(run_dir: Path, rank: int, follow: bool) -> bool:
    """Print the end of a rank's log of the newest job. With `follow`, also print new lines until the job is over.
    Returns False if Ctrl-C ended this."""
    submitted = submissions(run_dir)
    if not submitted:
        raise UserError(f"{run_dir}: no job was submitted for this run; its logs, if any, are in {run_dir / 'log'}")
    job = next((job for job, _ in reversed(active(run_dir))), submitted[-1])
    log = Path(job.log)
    log = log.with_name(log.name.replace("_0_log", f"_{rank}_log"))
    ranks = _ranks_with_logs(job)
    if rank < 0 or (ranks and rank not in ranks and not follow):
        has = f"has logs of ranks 0 to {max(ranks)}" if ranks else "has no log yet; ranks are numbered from 0"
        raise UserError(f"--rank: got {rank}; job {job.job} {has}")
    if not exists(log) and not follow:
        raise UserError(f"{log}: does not exist yet; state of the job: {state_of(job).name}")
    if ranks and rank not in ranks:
        print(f"waiting for {log}; job {job.job} has logs of ranks 0 to {max(ranks)}", file=sys.stderr)
    try:
        for text in itertools.islice(_added_to(log, job), None if follow else 1):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\nthe job continues; bfsys slurm stop {shlex.quote(str(run_dir))} ends it", file=sys.stderr)
        return False
    return True


def follow(run_dir: Path) -> int:
    """Show rank 0's log until the job is over. Returns training's exit code, 1 if it recorded none, or 0 if it
    continues."""
    if not show_log(run_dir, 0, follow=True) or active(run_dir):
        return 0
    ended = how_it_ended(run_dir)
    return ended["exit_code"] if ended else 1


def _added_to(log: Path, job: Submitted) -> Iterator[str]:
    """Yield the log's last lines, and new text until the job is over."""
    while not exists(log):
        if state_of(job).is_over:
            raise UserError(f"job {job.job}: {state_of(job).name}, and it wrote no {log}")
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


def _ranks_with_logs(job: Submitted) -> list[int]:
    first = Path(job.log)
    form = re.compile(re.escape(first.name).replace("_0_log", r"_(\d+)_log"))
    names = [path.name for path in first.parent.iterdir()] if is_dir(first.parent) else []
    return [int(match[1]) for name in names if (match := form.fullmatch(name))]


def stop(run_dir: Path) -> int:
    """Ask SLURM to end the run's jobs without a requeue. Training saves a checkpoint if KillWait is long enough."""
    found = active(run_dir)
    if not found:
        raise UserError(f"{run_dir}: this run has no pending or running job")
    if (job := found[-1])[1] == NO_ANSWER:
        raise UserError(f"{run_dir}: SLURM does not answer whether job {job[0].job} is over; {IS_IT_UP}")
    console.go_on_without()  # a closed console must not stop this loop
    for submitted, state in found:
        answer = ask("scancel", submitted.job)
        if not answer.is_good:
            raise UserError(f"scancel {submitted.job}: {answer.errors.strip()}")
        done, end = "asked to save and to end", "cancelled before the run could save"
        if state.name in ("PENDING", "SUSPENDED"):  # SLURM does not continue a suspended job to end it
            done = "cancelled while it " + ("waited" if state.name == "PENDING" else "was suspended, so it cannot save")
            end = done
        if end == done or not how_it_ended(run_dir):  # training replaces this when it has saved
            note_end(run_dir, EXIT_STOPPED, f"job {submitted.job} was {end}")
        print(f"job {submitted.job}: {done}; see bfsys slurm status {shlex.quote(str(run_dir))}")
    return 0
