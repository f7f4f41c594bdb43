"""The steps of `bfsys fit`: survey a folder of files, pack, choose settings, measure, train, evaluate.

The settings are written to RUNS/NAME.yaml once, before training. After a stop, the same command resumes with this file,
and the user may edit it. The number of steps follows from a short training on this machine, whose bytes per second
include optimizer, loader and decoding.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from bfsys.checkpoint.files import find_newest, step_of
from bfsys.checkpoint.retention import evaluations
from bfsys.config import Config, load_config
from bfsys.data.media.encodings import AS_STORED
from bfsys.data.storage.description import read_description
from bfsys.data.storage.shards import open_split
from bfsys.data.streaming.datasets import evaluable_splits
from bfsys.errors import UserError, counted, one_line, os_errors_as
from bfsys.files import exists, read_regular, replace_file
from bfsys.fitting.choice import LEAST_STEPS, Choice, Machine, choice_of, choose, settings_of, to_yaml
from bfsys.fitting.folder import check_classes, pack_all, survey_folder, trained_classes
from bfsys.fitting.request import Request
from bfsys.fitting.survey import Survey
from bfsys.fitting.trial import SHARE_OF_TIME, Trial, try_out
from bfsys.launch.local import choose_ranks, launch
from bfsys.model.precision import cpu_multiplies_bf16
from bfsys.ranks import gpu_count

RECORD = "# bfsys fit: "  # begins the line of the config that records the request as JSON
CONTENT = "content"  # key of the record: what the folder contained


def prepare(request: Request, began_s: float) -> Config | int:
    """Return the config of an earlier start, or a new one. Returns an exit code if a signal ended the trial."""
    if exists(request.config_file):
        record = check_record(request)
        print(f"{request.config_file}: reusing the config that an earlier start wrote", flush=True)
        note_changes(request, record)
        return load_config(request.config_file, overrides_of(request))
    survey = survey_folder(request)
    print("\n".join(map(one_line, [f"{request.folder}:", *(f"  {line}" for line in survey.describe())])), flush=True)
    gpus = gpu_count()
    machine = Machine("gpu", gpus, True) if gpus else Machine("cpu", choose_ranks(8, None), cpu_multiplies_bf16())
    choice = choose(survey, machine, 60 * request.minutes * SHARE_OF_TIME, as_stored=request.as_stored)
    if survey.kinds_tell_classes and choice.format.encoding != AS_STORED:
        print(
            "note: the formats of the files differ between classes, and re-encoding removes that difference; if the "
            "model should use the format, add --as-stored"
        )
    while True:
        data, eval_data = pack_all(request, choice)
        check_classes(request.folder, trained_classes(Path(eval_data)))
        lengths = open_split(eval_data, "train").samples["length"].astype(np.int64)  # bad files are left out of these
        choice = choice_of(survey, machine, choice.format, lengths)
        trial = try_out(request, choice, data, eval_data)
        if isinstance(trial, int):
            return trial
        passed_s, step_bytes = time.monotonic() - began_s, choice.batch_samples * float(choice.lengths.mean())
        left_s = 60 * request.minutes - passed_s
        steps = trial.steps_in(left_s, step_bytes)
        if steps >= LEAST_STEPS or not choice.format.smaller() or not trial.allows_another(left_s):
            break
        print(
            f"{choice.format.describe()}: only {counted(steps, 'step')} in the time that is left; trying a smaller size"
        )
        choice = choose_smaller(survey, choice, trial, left_s)
    if steps < LEAST_STEPS:
        # With more time, the command may try a larger size first.
        needed_s = passed_s + trial.start_s + trial.seconds_for(LEAST_STEPS, step_bytes)
        minutes = np.ceil(needed_s / 60 + 1)
        raise UserError(
            f"--minutes: got {request.minutes:g}; this machine trains {counted(steps, 'step')} in that time, "
            f"and at least {LEAST_STEPS} are needed. Allow about {counted(int(minutes), 'minute')}"
        )
    write_config(request, survey, choice, data, eval_data, min(steps, choice.most_steps()))
    return load_config(request.config_file, overrides_of(request))


def choose_smaller(survey: Survey, choice: Choice, trial: Trial, left_s: float) -> Choice:
    """The largest smaller format that allows LEAST_STEPS in the time that another trial leaves, at the speed of this
    one; else the smallest. Each trial takes time, so formats that cannot fit are not tried."""
    form = choice.format
    while smaller := form.smaller():
        form, choice = smaller, choice_of(survey, choice.machine, smaller)
        step_bytes = choice.batch_samples * float(choice.lengths.mean())
        if trial.steps_in(left_s - trial.start_s, step_bytes) >= LEAST_STEPS:
            break
    return choice


def overrides_of(request: Request) -> tuple[str, ...]:
    return (f"name={request.name}", f"runs_dir={request.runs}")


def check_record(request: Request) -> dict:
    """The record in the config. Raises UserError if the config was not chosen for this request."""
    path = request.config_file
    try:
        lines = read_regular(path).decode().splitlines()
        record = next((json.loads(line.removeprefix(RECORD)) for line in lines if line.startswith(RECORD)), None)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, or give another --name") from None
    if record is None:
        raise UserError(f"{path}: is a config that `bfsys fit` did not write; give another --name")
    for key, asked in request.record().items():
        if record.get(key) != asked:
            raise UserError(
                f"{path}: was chosen for {key} {record.get(key)!r}, and this command asks for {asked!r}; to start "
                f"again, give another --name, or remove this file and {request.run_dir}"
            )
    return record


def note_changes(request: Request, record: dict) -> None:
    """Print a note if the folder has changed since it was packed. The run continues with the packed files."""
    try:
        packed, now = record.get(CONTENT), content_of(survey_folder(request))
    except UserError as error:
        print(f"note: {error.problems[0]}; this run continues with the packed files", file=sys.stderr)
        return
    if packed is None or packed.items() <= now.items():  # a config of an earlier version has no digest
        return
    before, after = (f"{c['files']:,} files and {c['train_bytes']:,} bytes for training" for c in (packed, now))
    what = f"it had {before}, and has {after} now"
    if before == after:
        what = f"it still has {before}, but names, classes, splits, times or bytes of files differ"
    print(
        f"note: {request.folder} has changed since this run began: {what}. The run was begun with the earlier "
        "files; to train on the current ones, give another --name",
        file=sys.stderr,
    )


def content_of(survey: Survey) -> dict[str, int | str]:
    """Values that show whether the folder has changed."""
    return {
        "files": sum(survey.files.values()),
        "train_bytes": int(survey.train_bytes.sum()),
        "digest": survey.digest,
    }


def write_config(request: Request, survey: Survey, choice: Choice, data: str, eval_data: str, steps: int) -> None:
    record = f"{RECORD}{json.dumps({**request.record(), CONTENT: content_of(survey)})}"
    header = [
        f"Chosen by `bfsys fit` for {one_line(str(request.folder))}; each value has its reason.",
        "The same command resumes the run. For a new run with other settings: bfsys launch THIS_FILE name=OTHER",
        record.removeprefix("# "),
    ]
    text = to_yaml(settings_of(choice, data, eval_data, steps, request.minutes), header)
    with os_errors_as(f"{request.config_file}: cannot be written"):
        request.runs.mkdir(parents=True, exist_ok=True)
        replace_file(request.config_file, text)
    print(f"config      {request.config_file}:\n\n{text}", flush=True)


def train(request: Request, config: Config) -> int:
    """Train or resume until the last step and its evaluation. Returns the exit code."""
    path, _ = find_newest(request.run_dir)
    if path and step_of(path) >= config.train.steps and is_evaluated(request.run_dir, config):
        print(f"{request.run_dir}: training has already finished ({step_of(path)} steps)", flush=True)
        return 0
    return launch(config, request.config_file, overrides_of(request), None, is_dry_run=False)


def is_evaluated(run_dir: Path, config: Config) -> bool:
    """Whether the evaluation after the last step is recorded, or there is nothing to evaluate. A run that was killed
    after its last step may lack it."""
    if max(evaluations(run_dir), default=0) >= config.train.steps:
        return True
    return config.data.eval_split not in evaluable_splits(config, {})


def next_commands(request: Request, config: Config) -> list[str]:
    is_encoded = any(s.augment or read_description(Path(s.path))["encoding"] != AS_STORED for s in config.data.sources)
    encode, run = " --encode" if is_encoded else "", shlex.quote(str(request.run_dir))
    return [f"bfsys predict {run} FILE{encode}", f"bfsys explain {run} FILE{encode}", f"bfsys serve {run}"]
