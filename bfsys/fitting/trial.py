"""A short training that measures the speed of this machine. It includes optimizer, loader and decoding."""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from bfsys.checkpoint.files import METRICS
from bfsys.config import load_config
from bfsys.errors import UserError
from bfsys.files import try_lock
from bfsys.fitting.choice import Choice, settings_of, to_yaml
from bfsys.fitting.request import Request
from bfsys.json_lines import read_json_lines
from bfsys.launch.job import CODE_DIR, TrainJob
from bfsys.launch.local import KILLED, choose_ranks, run_group
from bfsys.process import end_of
from bfsys.supervision.signals import EXIT_CODES

PREFIX, LOCK = "bfsys-fit-", "lock"  # of temporary folders; a file in them
TRIAL_STEPS = 6
PASSED_OVER_STEPS = 2  # the first steps, which allocate memory, are not measured
EVALUATIONS = 5  # four during the run, one for the report
SHARE_OF_TIME = 0.9  # share of the remaining time for training; machines are not always as fast as in the trial
REPORT_S = 15.0  # loads the model, computes the baselines and draws the plots


@dataclass(frozen=True)
class Trial:
    """The speed of a short trial training on this machine, with the times of its start and evaluation."""

    bytes_per_s: float
    start_s: float
    evaluation_s: float

    @property
    def other_s(self) -> float:
        """Seconds for everything except the steps."""
        return self.start_s + EVALUATIONS * self.evaluation_s + REPORT_S

    def allows_another(self, seconds: float) -> bool:
        """Whether the start of another trial, that of the training and the report fit into the time."""
        return 2 * self.start_s + REPORT_S < seconds

    def steps_in(self, seconds: float, mean_step_bytes: float) -> int:
        return max(0, int(SHARE_OF_TIME * (seconds - self.other_s) * self.bytes_per_s / mean_step_bytes))

    def seconds_for(self, steps: int, mean_step_bytes: float) -> float:
        return self.other_s + steps * mean_step_bytes / self.bytes_per_s / SHARE_OF_TIME


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is removed at the end. Those of killed processes are removed first; a lock tells that a process
    still runs."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), open(left / LOCK, "rb") as file:  # another user's, or just being made
            if try_lock(file):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, open(Path(folder) / LOCK, "wb") as file:
        try_lock(file)
        yield folder


def reasons_of(code: int, said: list[str], longest: int) -> list[str]:
    """Why a trial ended with this code, from the lines that it printed. A killed rank has printed no reason."""
    if reasons := [line.partition("error: ")[2] for line in said if "error: " in line]:
        return reasons
    if code != KILLED:
        return said[-1:]
    return [
        f"its longest file has {longest:,} bytes; if memory ran out, leave out long files (bfsys pack "
        "--max-file-bytes SIZE --skip-bad), and give the packed folder to fit"
    ]


def try_out(request: Request, choice: Choice, data: str, eval_data: str) -> Trial | int:
    """Train TRIAL_STEPS in a temporary run. Returns an exit code if a signal ended it."""
    began_s = time.monotonic()
    print(f"measuring   {TRIAL_STEPS} steps on {choice.machine.describe()}", flush=True)
    with temporary_folder() as folder:
        file = Path(folder) / "trial.yaml"
        settings = settings_of(choice, str(Path(data).absolute()), str(Path(eval_data).absolute()), TRIAL_STEPS, 0)
        file.write_text(to_yaml(settings, []), encoding="utf-8")
        overrides = (f"runs_dir={folder}", "train.log_every=1", "train.eval_every=0", f"train.save_every={TRIAL_STEPS}")
        config = load_config(file, overrides)
        job = TrainJob(file, overrides, CODE_DIR, Path.cwd())
        said = io.StringIO()
        with redirect_stdout(said):
            code = run_group(job, choose_ranks(config.data.lanes, None), config.run_dir / "log")
        if code in EXIT_CODES.values():
            return code
        lines = list(read_json_lines(config.run_dir / METRICS, {"kind": str, "step": int}))
        steps = [line for line in lines if line["kind"] == "train"][PASSED_OVER_STEPS:]
        evaluated = [line for line in lines if line["kind"] == "eval"]
        if code or not steps or not evaluated:
            reasons = reasons_of(code, said.getvalue().splitlines(), longest=int(choice.lengths.max()))
            raise UserError(*(f"{request.folder}: the trial training {end_of(code)}: {r}" for r in reasons))
        seconds = sum(line["step_s"] for line in steps)
        evaluation_s = evaluated[-1]["seconds"]
        return Trial(
            bytes_per_s=sum(line["bytes_per_s"] * line["step_s"] for line in steps) / seconds,
            start_s=max(0.0, time.monotonic() - began_s - evaluation_s - seconds * TRIAL_STEPS / len(steps)),
            evaluation_s=evaluation_s,
        )
