"""The steps of `bfsys fit`: survey a folder of files, pack, choose settings, measure, train, evaluate.

The settings are written to RUNS/NAME.yaml once, before training. After a stop, the same command resumes with this file,
and the user may edit it. The number of steps follows from a short training on this machine, whose bytes per second
include optimizer, loader and decoding.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from bfsys.checkpoint.files import METRICS, find_newest, step_of
from bfsys.checkpoint.retention import evaluations
from bfsys.config import Config, load_config
from bfsys.data.media.encodings import AS_STORED, Fitting, parse_encoding
from bfsys.data.packing.checks import check_files
from bfsys.data.packing.listing import Listing
from bfsys.data.packing.pack import Packing, list_source, name_bad_files, pack
from bfsys.data.packing.staging import note_on_skipped, skipped_files
from bfsys.data.storage.description import DESCRIPTION, read_description
from bfsys.data.storage.shards import open_split
from bfsys.data.streaming.datasets import evaluable_splits
from bfsys.errors import UserError, counted, one_line
from bfsys.files import read_regular, replace_file
from bfsys.fitting.choice import LEAST_STEPS, Choice, Format, Machine, choice_of, choose, settings_of, to_yaml
from bfsys.fitting.survey import Survey, survey_of
from bfsys.json_lines import read_json_lines
from bfsys.launch.job import TrainJob
from bfsys.launch.local import choose_ranks, launch, run_group
from bfsys.model.precision import cpu_multiplies_bf16
from bfsys.ranks import gpu_count
from bfsys.supervision.signals import EXIT_CODES

RECORD = "# bfsys fit: "  # begins the line of the config that records the request as JSON
CONTENT = "content"  # key of the record: what the folder contained
LONGEST_NAME = 100  # of a run; file systems allow names of 255 bytes
TRIAL_STEPS = 6
PASSED_OVER_STEPS = 2  # the first steps, which allocate memory, are not measured
EVALUATIONS = 5  # four during the run, one for the report
SHARE_OF_TIME = 0.9  # share of the remaining time for training; machines are not always as fast as in the trial
REPORT_S = 15.0  # loads the model, computes the baselines and draws the plots
SHARD_BYTES = 100_000_000
FITTED = "fitted"  # extension of the file beside a dataset that names its source folder


@dataclass(frozen=True)
class Request:
    """The arguments of `bfsys fit`."""

    folder: Path
    name: str
    minutes: float
    as_stored: bool
    skip_bad: bool
    shards: Path
    runs: Path

    @property
    def config_file(self) -> Path:
        return self.runs / f"{self.name}.yaml"

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    def record(self) -> dict:
        return {"folder": str(self.folder.absolute()), "minutes": self.minutes, "as_stored": self.as_stored}


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


def name_for(folder: Path) -> str:
    """Derive the name of a run from the name of its folder. Names of files contain it, so a long one is cut."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.absolute().name)[:LONGEST_NAME].strip("._-") or "fit"


def prepare(request: Request, began_s: float) -> Config | int:
    """Return the config of an earlier start, or a new one. Returns an exit code if a signal ended the trial."""
    if request.config_file.exists():
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
        steps = trial.steps_in(60 * request.minutes - passed_s, step_bytes)
        smaller = choice.format.smaller()
        if steps >= LEAST_STEPS or smaller is None or not trial.allows_another(60 * request.minutes - passed_s):
            break
        print(
            f"{choice.format.describe()}: only {counted(steps, 'step')} in the time that is left; trying a smaller size"
        )
        choice = choice_of(survey, machine, smaller)
    if steps < LEAST_STEPS:
        minutes = np.ceil((passed_s + trial.seconds_for(LEAST_STEPS, step_bytes)) / 60 + 1)
        raise UserError(
            f"--minutes: got {request.minutes:g}; this machine trains {counted(steps, 'step')} in that time, "
            f"and at least {LEAST_STEPS} are needed. Allow about {counted(int(minutes), 'minute')}"
        )
    write_config(request, survey, choice, data, eval_data, min(steps, choice.most_steps()))
    return load_config(request.config_file, overrides_of(request))


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


def survey_folder(request: Request) -> Survey:
    """Survey the folder. Raises UserError if it cannot be packed or trained on."""
    if is_packed(request.folder):
        found = survey_of_packed(request.folder)
        trained = trained_classes(request.folder)
    else:
        listing = listed(request)
        check_splits(request.folder, {file.split for file in listing.files})
        found = survey_of(listing.files, listing.classes)
        trained = sorted({file.class_name for file in listing.files if file.split == "train"})
    check_classes(request.folder, trained)
    return found


def trained_classes(dataset: Path) -> list[str]:
    """The classes of a packed dataset that have training files."""
    counts = read_description(dataset)["splits"]["train"]["class_counts"]
    return [name for name, count in counts.items() if count]


def check_classes(folder: Path, trained: list[str]) -> None:
    """Raise UserError unless two classes have training files."""
    if len(trained) < 2:
        names = "".join(map(repr, trained)) or "none"
        inner = next((path for name in trained if has_folders(path := folder / name)), None)
        remedy = f". If the folders in {inner} are the classes or splits, give {inner} to fit" if inner else ""
        raise UserError(f"{folder}: only one class has training files, {names}; a classifier needs at least 2{remedy}")


def has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def is_packed(folder: Path) -> bool:
    return (folder / DESCRIPTION).exists()


def survey_of_packed(folder: Path) -> Survey:
    """Survey a packed dataset. Its files are not re-encoded."""
    description = read_description(folder)
    check_splits(folder, set(description["splits"]))
    splits = {split: open_split(folder, split) for split in description["splits"]}
    lengths = {name: split.samples["length"].astype(np.int64) for name, split in splits.items()}
    return Survey(
        classes=tuple(description["classes"]),
        files={split: len(of_split) for split, of_split in lengths.items()},
        train_bytes=lengths["train"],
        longest=max(int(of_split.max()) for of_split in lengths.values() if len(of_split)),
        kinds={f"packed {description['encoding']}": len(lengths["train"])},
        modality=None,
        typical_size=0.0,
        rate_hz=0,
        digest=xxhash.xxh3_128_hexdigest("".join(split.fingerprint for split in splits.values()).encode()),
    )


def check_splits(folder: Path, splits: set[str]) -> None:
    """Raise UserError unless there is a train split and a val or test split."""
    if "train" not in splits or not splits & {"val", "test"}:
        raise UserError(
            f"{folder}: has the split {', '.join(sorted(splits))} alone; a train split and a val or test split are "
            "needed. Put the class folders into the folder itself, and a tenth of the files is set aside for validation"
        )


def listed(request: Request) -> Listing:
    """List the files with their sizes and splits."""
    packing = packing_of(request, Format())
    listing = list_source(packing)
    check_files(listing, None, packing.encoding, packing.share_for_val)
    problems = listing.problems + ([] if request.skip_bad else name_bad_files(listing.bad))
    if any("--from" in problem for problem in problems):
        problems.append("--from is an option of `bfsys pack`: pack the files by it, and give the packed folder to fit")
    if problems:
        raise UserError(*problems)
    trained = {file.class_name for file in listing.files if file.split == "train"}
    for name in sorted(set(listing.classes) - trained):
        print(f"note: the class {one_line(name)} has no training file, so the model cannot learn it", file=sys.stderr)
    return listing


def pack_all(request: Request, choice: Choice) -> tuple[str, str]:
    """Return the packed training data and evaluation data. They are one dataset unless training files are augmented."""
    if is_packed(request.folder):
        return str(request.folder), str(request.folder)
    encoded = packing_of(request, choice.format)
    pack_one(request, encoded)
    if not choice.format.augmented:
        return str(encoded.folder), str(encoded.folder)
    # Augmentation decodes the stored files, so those that cannot be decoded are left out here, too
    stored = replace(packing_of(request, Format()), known_bad=skipped_files(encoded.folder))
    pack_one(request, stored)
    return str(stored.folder), str(encoded.folder)


def pack_one(request: Request, packing: Packing) -> None:
    claim(packing.folder, request.folder)
    pack(packing)
    parts = read_description(packing.folder)["splits"].items()
    files = ", ".join(f"{part['samples']:,} {name}" for name, part in parts)
    print(f"packed      {packing.folder} ({packing.encoding.text}): {files}", flush=True)
    if note := note_on_skipped(packing.folder):
        print(f"  {note}", flush=True)


def claim(folder: Path, source: Path) -> None:
    """Record the source folder of a dataset beside it. Raises UserError if the dataset has another source: earlier runs
    that were trained on it would then be evaluated on other files."""
    note, ours = folder.with_name(f".{folder.name}.{FITTED}"), str(source.absolute())
    with suppress(OSError):
        theirs = read_regular(note).decode(errors="surrogateescape")
        if theirs == ours:
            return
        if is_packed(folder):
            raise UserError(f"{folder}: holds the packed files of {theirs}; give another --name or --shards")
    if is_packed(folder):
        raise UserError(f"{folder}: holds a dataset that `bfsys fit` did not pack; give another --name or --shards")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, ours.encode(errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def packing_of(request: Request, form: Format) -> Packing:
    size = form.image_size or form.sample_rate_hz
    return Packing(
        src=request.folder,
        folder=request.shards / (f"{request.name}-{size}" if size else request.name),
        layout="tree" if request.folder.is_dir() else "filelist",
        subdir="",
        split=None,
        splits=None,
        val_share=None,
        encoding=parse_encoding(form.encoding),
        fitting=Fitting(form.image_size, form.sample_rate_hz, form.seconds),
        shard_bytes=SHARD_BYTES,
        max_file_bytes=None,
        skip_bad=request.skip_bad,
        workers=len(os.sched_getaffinity(0)),
        seed=0,
    )


def try_out(request: Request, choice: Choice, data: str, eval_data: str) -> Trial | int:
    """Train TRIAL_STEPS in a temporary run. Returns an exit code if a signal ended it."""
    began_s = time.monotonic()
    print(f"measuring   {TRIAL_STEPS} steps on {choice.machine.describe()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bfsys-fit-") as folder:
        file = Path(folder) / "trial.yaml"
        settings = settings_of(choice, str(Path(data).absolute()), str(Path(eval_data).absolute()), TRIAL_STEPS, 0)
        file.write_text(to_yaml(settings, []), encoding="utf-8")
        overrides = (f"runs_dir={folder}", "train.log_every=1", "train.eval_every=0", f"train.save_every={TRIAL_STEPS}")
        config = load_config(file, overrides)
        job = TrainJob(file, overrides, Path(__file__).resolve().parents[2], Path.cwd())
        said = io.StringIO()
        with redirect_stdout(said):
            code = run_group(job, choose_ranks(config.data.lanes, None), config.run_dir / "log")
        if code in EXIT_CODES.values():
            return code
        lines = list(read_json_lines(config.run_dir / METRICS, {"kind": str, "step": int}))
        steps = [line for line in lines if line["kind"] == "train"][PASSED_OVER_STEPS:]
        evaluated = [line for line in lines if line["kind"] == "eval"]
        if code or not steps or not evaluated:
            output = said.getvalue().splitlines()
            reasons = [line.partition("error: ")[2] for line in output if "error: " in line] or output[-1:]
            raise UserError(*(f"{request.folder}: the trial training ended with code {code}: {r}" for r in reasons))
        seconds = sum(line["step_s"] for line in steps)
        evaluation_s = evaluated[-1]["seconds"]
        return Trial(
            bytes_per_s=sum(line["bytes_per_s"] * line["step_s"] for line in steps) / seconds,
            start_s=max(0.0, time.monotonic() - began_s - evaluation_s - seconds * TRIAL_STEPS / len(steps)),
            evaluation_s=evaluation_s,
        )


def write_config(request: Request, survey: Survey, choice: Choice, data: str, eval_data: str, steps: int) -> None:
    record = f"{RECORD}{json.dumps({**request.record(), CONTENT: content_of(survey)})}"
    header = [
        f"Chosen by `bfsys fit` for {one_line(str(request.folder))}; each value has its reason.",
        "The same command resumes the run. For a new run with other settings: bfsys launch THIS_FILE name=OTHER",
        record.removeprefix("# "),
    ]
    text = to_yaml(settings_of(choice, data, eval_data, steps, request.minutes), header)
    try:
        request.runs.mkdir(parents=True, exist_ok=True)
        replace_file(request.config_file, text)
    except OSError as error:
        raise UserError(f"{request.config_file}: cannot be written: {error.strerror}") from None
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
