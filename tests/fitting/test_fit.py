"""One command turns a folder into a trained and evaluated model."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bfsys
from bfsys.checkpoint.files import METRICS
from bfsys.checkpoint.retention import evaluations
from bfsys.cli import call
from bfsys.config import Config, load_config
from bfsys.data.storage.description import read_description
from bfsys.errors import UserError, exit_code_of
from bfsys.fitting import choice as rules
from bfsys.fitting import fit
from bfsys.fitting.choice import Choice, Machine, choose
from bfsys.fitting.fit import RECORD, is_evaluated, prepare
from bfsys.fitting.folder import check_classes, listed, pack_all, survey_folder
from bfsys.fitting.request import Request, name_for
from bfsys.fitting.survey import Survey, survey_of
from bfsys.fitting.trial import Trial
from tests.commands.packing_helpers import make_files, png_bytes, wav_bytes
from tests.forked import Forked


def folder_of(folder: Path, files: int, content: dict[str, int] | None = None) -> Path:
    """Write files whose class is the order of two bytes. Byte counts do not tell the class."""
    rng = np.random.default_rng(0)
    names = {}
    for name, first in (content or {"rising": 10, "falling": 200}).items():
        for i in range(files):
            data = rng.integers(100, 110, 60, dtype=np.uint8)
            place = int(rng.integers(0, 50))
            data[place : place + 6] = np.linspace(first, 210 - first, 6)
            names[f"{name}/{i}.bin"] = data.tobytes()
    return make_files(folder, names)


def fit_in_few_steps(*arguments: object) -> tuple[int | None, str, str]:
    """Run `bfsys fit` with a tiny model and few steps. Returns (exit code, output, standard error)."""
    process = Forked(_fit_in_few_steps, arguments, {})
    said = process.communicate(timeout=900)
    return process.returncode, *said


def _fit_in_few_steps(*arguments: object) -> None:
    rules.ENOUGH_FOR_FEW_FILES, rules.MOST_PASSES = rules.LEAST_STEPS, 0
    rules.SMALL = {"dim": 32, "layers": 2, "heads": 2, "merge_after": [0], "window": 16, "shift": 8}
    sys.exit(exit_code_of(lambda: call("fit", [*map(str, arguments)])))


def test_a_folder_becomes_a_model_that_beats_byte_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = folder_of(tmp_path / "slopes", 70)
    options = ["--minutes", "30", "--runs", str(tmp_path / "runs"), "--shards", str(tmp_path / "shards")]
    code, said, errors = fit_in_few_steps(src, *options)
    assert code == 0, said + errors
    run = tmp_path / "runs" / "slopes"
    percent = {
        line[:27].strip(): float(line[27:].split()[0]) for line in said.splitlines() if line.startswith("top-1 ")
    }
    assert percent["top-1 of this model"] >= 90 > percent["top-1 from byte counts"]
    assert {"confusion.png", "learning_curve.png", "classes.tsv"} <= {p.name for p in (run / "report").iterdir()}
    model = bfsys.load(run)
    assert model.classes == ("falling", "rising")
    for command in (f"bfsys predict {run} FILE\n", f"bfsys explain {run} FILE\n", f"bfsys serve {run}\n"):
        assert command in said

    monkeypatch.chdir(tmp_path)  # the same from Python, which does not repeat the training
    monkeypatch.setenv("PYTHONPATH", str(Path(bfsys.__file__).parents[1]))
    assert bfsys.fit(src, minutes=30, shards="shards") == Path("runs/slopes")
    again, errors = capsys.readouterr()
    assert "runs/slopes: training has already finished" in again
    assert not errors
    assert said.partition("held-out")[2].partition("lowest")[0] == again.partition("held-out")[2].partition("lowest")[0]
    with pytest.raises(UserError, match="--minutes: got 0; more than 0"):
        bfsys.fit(src, minutes=0)
    with pytest.raises(UserError, match=r"slopes\.yaml: was chosen for minutes 30\.0, and this command asks for 4"):
        call("fit", [str(src), *options, "--minutes", "4"])
    (src / "rising" / "more.bin").write_bytes(b"x" * 60)
    scores, lines = evaluations(run), (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text("".join(lines[:-1]))  # as after a kill during the last evaluation
    assert max(evaluations(run)) < max(scores)
    bfsys.fit(src, minutes=30, shards="shards")
    errors = capsys.readouterr().err
    assert evaluations(run).keys() == scores.keys()
    assert re.search(
        r"note: .*/slopes has changed since this run began: it had 140 files and .*, and has 141 files", errors
    )
    (src / "rising" / "none.bin").touch()
    bfsys.fit(src, minutes=30, shards="shards")
    errors = capsys.readouterr().err
    assert re.search(r"note: .*none\.bin: is empty; this run continues with the packed files", errors)


def test_the_survey_detects_kinds_sizes_and_rates(tmp_path: Path) -> None:
    def seen(names: dict[str, bytes]) -> tuple:
        folder = make_files(tmp_path / str(len(list(tmp_path.iterdir()))), names)
        listing = listed(Request(folder, "x", 1.0, False, False, tmp_path / "s", tmp_path / "r"))
        found = survey_of(listing.files, listing.classes)
        surveys.append(found)
        return found.modality, found.kinds, found.typical_size, found.rate_hz

    def tells(names: dict[str, bytes]) -> bool:
        seen(names)
        return surveys[-1].kinds_tell_classes

    surveys: list[Survey] = []

    pictures = {f"{c}/{i}.png": png_bytes(20 + i, 30, 9) for c in "ab" for i in range(3)}
    sounds = {f"{c}/{i}.wav": wav_bytes(0.5, 8000) for c in "ab" for i in range(3)}
    assert seen(pictures) == ("image", {"a PNG": 6}, 21.0, 0)
    assert seen(sounds) == ("audio", {"a WAV": 6}, 0.5, 8000)
    assert seen(pictures | sounds)[0] is None
    assert seen(pictures | {"a/cut.png": b"\x89PNG\r\n\x1a\n"})[0] is None
    assert seen({"a/1.txt": b"x", "a/2.txt": b"y", "b/1": b"z", "b/2": b"z"})[:2] == (None, {"other": 4})

    png, wav, file = png_bytes(20, 30, 9), wav_bytes(0.5, 8000), io.BytesIO()
    Image.new("RGB", (20, 30)).save(file, "JPEG")
    jpeg = file.getvalue()
    formats = {f"a/{i}.x": png for i in range(4)} | {f"b/{i}.x": jpeg for i in range(4)}
    assert not tells(pictures)
    assert tells(formats)
    assert not tells(formats | {"a/5.x": jpeg, "a/6.x": jpeg, "b/5.x": png, "b/6.x": png})
    assert tells({f"a/{i}.x": png for i in range(4)} | {f"b/{i}.x": wav for i in range(4)})
    # Twenty words and digits, half of them spoken: the kind of a file does not tell the class.
    joint = {f"{c}/{i}.x": png if c < "k" else wav for c in "abcdefghijklmnopqrst" for i in range(2)}
    assert not tells(joint)
    # A single file that is not a picture does not change the result. Packing reports it.
    assert seen({f"{c}/{i}.png": png for c in "ab" for i in range(8)} | {"a/readme": b"x"})[0] == "image"
    # The header of a picture may be longer than the bytes that are read for its kind.
    with Image.open(io.BytesIO(jpeg)) as image:
        image.save(large := io.BytesIO(), "JPEG", comment=b"c" * 60_000, exif=b"Exif\0\0" + bytes(60_000))
    assert seen({f"{c}/{i}.jpg": large.getvalue() for c in "ab" for i in range(3)})[2] == 20


def test_packed_data_stay_unchanged(datasets: Path, tmp_path: Path) -> None:
    request = Request(datasets / "b", "x", 1.0, False, False, tmp_path / "s", tmp_path / "r")
    found = survey_folder(request)
    assert (found.classes, found.files, found.modality) == (("b0", "b1"), {"train": 80, "val": 14}, None)
    choice = choose(found, Machine("cpu", 2, multiplies_bf16=False), 60, as_stored=False)
    assert pack_all(request, choice) == (str(datasets / "b"), str(datasets / "b"))


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, *, skip_bad: bool = False) -> Config:
    """The config for a folder on a machine that needs no time for anything."""
    root = folder.parent
    monkeypatch.setattr(fit, "try_out", lambda *_: Trial(bytes_per_s=1e9, start_s=0.0, evaluation_s=0.0))
    config = prepare(Request(folder, "x", 9.0, False, skip_bad, root / "shards", root / "runs"), time.monotonic())
    assert isinstance(config, Config)
    return config


def pictures(format: str, side: int, cut: int) -> dict[str, bytes]:
    """60 noise pictures of each of two classes. The last `cut` of the second class are truncated."""
    rng, files = np.random.default_rng(0), {}
    for number in range(120):
        image = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
        image.save(file := io.BytesIO(), format)
        content = file.getvalue() if number < 120 - cut else file.getvalue()[:1000]
        files[f"{'ab'[number // 60]}/{number}.{format.lower()}"] = content
    return files


def test_bad_files_are_named_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_files(tmp_path / "src", {**pictures("PNG", 32, 30), "a/empty.png": b""})
    with pytest.raises(UserError, match=r"empty\.png: is empty"):
        prepared(folder, monkeypatch)
    config = prepared(folder, monkeypatch, skip_bad=True)
    packed = Path(config.data.sources[0].path)
    files = {name: part["samples"] for name, part in read_description(packed)["splits"].items()}
    assert sum(files.values()) == 90
    said = capsys.readouterr().out
    assert f"packed      {packed} (tiff): {files['train']} train, {files['val']} val\n" in said
    assert f"left out: 31 bad files, named in {packed}/skipped.txt" in said
    text = (tmp_path / "runs" / "x.yaml").read_text()
    assert f"# {files['train']} files of 3,2" in text
    passes = config.train.steps * config.data.batch_samples / files["train"]
    assert f"{passes:.1f} passes over the training files" in text


def test_training_files_that_cannot_be_augmented_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = prepared(make_files(tmp_path / "src", pictures("JPEG", 72, 30)), monkeypatch, skip_bad=True)
    (source,) = config.data.sources
    assert source.augment
    stored, encoded = (read_description(Path(path)) for path in (source.path, source.eval_path) if path)
    assert (stored["encoding"], encoded["encoding"]) == ("as_stored", "tiff")
    counts = [[part["samples"] for part in each["splits"].values()] for each in (stored, encoded)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 90


@pytest.mark.parametrize(("start_s", "tried"), [(0.0, ["48", "16"]), (300.0, ["48"])])
def test_smaller_sizes_are_tried_only_if_time_is_left(
    start_s: float, tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial takes the start of a training. Without time for it, `fit` would exceed --minutes many times over."""
    sizes = []

    def try_out(request: Request, choice: rules.Choice, *_: str) -> Trial:
        sizes.append(str(choice.format.image_size))
        return Trial(bytes_per_s=1.0, start_s=start_s, evaluation_s=0.0)

    monkeypatch.setattr(fit, "try_out", try_out)
    folder = make_files(tmp_path / "src", pictures("PNG", 48, 0))
    with pytest.raises(UserError, match="this machine trains 0 steps in that time"):
        prepare(Request(folder, "x", 9.0, False, False, tmp_path / "s", tmp_path / "r"), time.monotonic())
    assert sizes == tried


def test_a_class_of_which_all_files_are_bad_cannot_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_files(tmp_path / "src", pictures("PNG", 32, 60))
    with pytest.raises(UserError, match="src: only the class 'a' has training files; a classifier needs at least 2"):
        prepared(folder, monkeypatch, skip_bad=True)
    with pytest.raises(UserError, match="src: no class has training files; a classifier needs at least 2 classes"):
        check_classes(folder, [])


def test_changes_of_the_folder_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "src", 20)

    def note() -> str:
        prepared(folder, monkeypatch)
        return capsys.readouterr().err

    config_file = tmp_path / "runs" / "x.yaml"
    assert note() == note() == ""
    (folder / "rising" / "3.bin").rename(folder / "falling" / "moved.bin")
    assert re.search("note: .*/src has changed since this run began: it still has 40 files .*, but names, ", note())
    config_file.write_text(re.sub(r', "digest": "\w+"', "", config_file.read_text()))  # as an earlier version wrote it
    assert note() == ""
    (folder / "rising" / "more.bin").write_bytes(b"x" * 60)
    assert "it had 40 files and" in note()


def test_a_dataset_that_was_packed_again_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, packed = folder_of(tmp_path / "src", 20), tmp_path / "packed"
    call("pack", [str(src), str(tmp_path), "--name", "packed"])
    prepared(packed, monkeypatch)
    prepared(packed, monkeypatch)
    assert "note: " not in capsys.readouterr().err
    (src / "rising" / "3.bin").rename(src / "falling" / "moved.bin")
    call("pack", [str(src), str(tmp_path), "--name", "packed"])
    prepared(packed, monkeypatch)
    assert "packed has changed since this run began" in capsys.readouterr().err


def test_a_run_without_its_last_evaluation_is_not_finished(finished_run: Path, tmp_path: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert is_evaluated(run, config)
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text("".join(line for line in lines if f'"step": {config.train.steps},' not in line))
    assert not is_evaluated(run, config)
    assert is_evaluated(run, replace(config, data=replace(config.data, eval_split="none")))


def test_a_run_that_was_trained_longer_tells_its_own_steps(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bfsys launch runs/x.yaml name=x train.steps=…` trains the run of `fit` longer than its config says."""
    config = load_config(finished_run / "config.yaml")
    shutil.copytree(finished_run, tmp_path / "x")
    shorter = replace(config, train=replace(config.train, steps=config.train.steps - 1))
    assert fit.train(Request(tmp_path, "x", 9.0, False, False, tmp_path, tmp_path), shorter) == 0
    assert f"training has already finished ({config.train.steps} steps)" in capsys.readouterr().out


def test_packed_files_of_another_folder_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{c}/{i}.bin": bytes([i]) * 20 for c in "ab" for i in range(8)}

    def pack_it(name: str, files: dict[str, bytes]) -> str:
        folder = make_files(tmp_path / name, files) if not (tmp_path / name).exists() else tmp_path / name
        request = Request(folder, "x", 1.0, False, False, tmp_path / "s", tmp_path / "r")
        choice = choose(survey_folder(request), Machine("cpu", 2, multiplies_bf16=False), 60, as_stored=False)
        return pack_all(request, choice)[0]

    assert pack_it("one", files) == pack_it("one", files) == str(tmp_path / "s" / "x")
    before = read_description(tmp_path / "s" / "x")
    with pytest.raises(UserError, match=f"holds the packed files of {tmp_path}/one; give another --name or --shards"):
        pack_it("two", files | {"c/1.bin": b"1", "c/2.bin": b"2"})
    assert read_description(tmp_path / "s" / "x") == before
    (tmp_path / "s" / ".x.fitted").unlink()
    with pytest.raises(UserError, match="holds a dataset that `bfsys fit` did not pack; give another --name"):
        pack_it("one", files)
    capsys.readouterr()
    split = {"train/a/1": b"1", "train/b/2": b"2", "val/a/3": b"3", "val/c/4": b"4"}
    pack_it_elsewhere = Request(make_files(tmp_path / "t", split), "y", 1.0, False, False, tmp_path, tmp_path)
    survey_folder(pack_it_elsewhere)
    assert "note: the class c has no training file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--runs", "--shards"])
def test_output_inside_of_the_folder_is_refused(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = folder_of(tmp_path / "src", 4)
    monkeypatch.chdir(src)
    options = {"--runs": str(tmp_path / "runs"), "--shards": str(tmp_path / "shards")} | {option: "new/folder"}
    with pytest.raises(
        UserError,
        match=f"{option} new/folder: lies in ., so its files would become training data; give another {option}",
    ):
        call("fit", [".", *(word for pair in options.items() for word in pair)])
    (tmp_path / "file").touch()
    options[option] = str(tmp_path / "file" / "new")
    with pytest.raises(UserError, match=f"{option} {tmp_path}/file/new: cannot be written"):
        call("fit", [".", *(word for pair in options.items() for word in pair)])
    assert {path.name for path in src.iterdir()} == {"rising", "falling"}


def test_a_folder_of_any_name_gets_a_config_that_can_be_read(tmp_path: Path) -> None:
    folder = os.fsdecode(b"a\nname: evil\xff")
    src, options = folder_of(tmp_path / folder, 70), ["--minutes", 30, "--runs", tmp_path, "--shards", tmp_path / "s"]
    code, said, errors = fit_in_few_steps(src, *options)
    assert code == 0, said + errors
    assert load_config(tmp_path / "a_name_evil.yaml").name == "a_name_evil"


def test_the_time_that_is_suggested_suffices() -> None:
    trial = Trial(bytes_per_s=1000.0, start_s=10.0, evaluation_s=60.0)
    assert trial.steps_in(60, 500.0) == 0
    assert trial.steps_in(trial.seconds_for(60, 500.0) + 0.1, 500.0) == 60


def test_the_suggested_minutes_suffice_with_the_trials_of_larger_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Survey(("a", "b"), {"train": 900, "val": 9}, np.full(900, 9), 9, {"a JPEG": 909}, "image", 240, 0)
    tried: list[int | None] = []

    def try_out(request: Request, choice: Choice, *_: str) -> Trial:
        tried.append(choice.format.image_size)
        return Trial(bytes_per_s=20_000.0, start_s=40.0, evaluation_s=1.0)

    monkeypatch.setattr(fit.time, "monotonic", lambda: 40.0 * len(tried))
    fakes = {
        **{"survey_folder": lambda _: found, "gpu_count": lambda: 0, "try_out": try_out},
        **dict.fromkeys(("trained_classes", "check_classes", "write_config"), lambda *_: None),
        **{"pack_all": lambda *_: ("", ""), "load_config": lambda *_: "config"},
        "open_split": lambda *_: SimpleNamespace(samples={"length": np.zeros(900)}),
        "choice_of": lambda survey, machine, form, lengths=None: rules.choice_of(survey, machine, form),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(fit, name, fake)
    request = Request(tmp_path, "x", 0.1, False, False, tmp_path / "s", tmp_path / "r")
    with pytest.raises(UserError, match="Allow about") as error:
        prepare(request, 0.0)
    minutes = float(re.findall(r"about (\d+) minute", str(error.value))[0])
    tried.clear()
    assert prepare(replace(request, minutes=minutes), 0.0) == "config"
    assert tried == [64, 16]  # no time was spent on 48 and 32, which do not fit at the speed of the first trial


def test_names_of_runs() -> None:
    assert name_for(Path("/data/My photos (2)")) == "My_photos_2"
    assert name_for(Path("/")) == "fit"
    assert name_for(Path("/data") / ("y" * 250)) == "y" * 100


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"one/1.bin": b"a", "one/2.bin": b"b"},
            "only the class 'one' has training files; a classifier needs at least 2",
        ),
        ({"pets/a/1.bin": b"a", "pets/b/2.bin": b"b"}, "src/pets are the classes or splits, give {src}/pets to fit"),
        ({"train/a/1.bin": b"a", "train/b/2.bin": b"b"}, "has the split train alone"),
        ({"a/1.bin": b"a", "a/2.bin": b"", "b/1.bin": b"c"}, "2.bin: is empty"),
        ({"a.bin": b"a"}, "has no class folders"),
    ],
)
def test_unusable_folders_are_refused(names: dict[str, bytes], message: str, tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", names)
    with pytest.raises(UserError) as error:
        call("fit", [str(src), "--runs", str(tmp_path / "runs"), "--shards", str(tmp_path / "shards")])
    assert message.format(src=src) in str(error.value)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: got 0; more than 0"),
        (["--minutes", "nan"], "--minutes: got nan"),
        (["--name", "a/b"], "--name: got 'a/b'"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        call(
            "fit", [str(folder_of(tmp_path / "src", 4)), "--runs", str(tmp_path), "--shards", str(tmp_path), *arguments]
        )
    assert message in str(error.value)


def test_a_list_in_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a pipe or a device, and fit reads a list repeatedly"):
        call("fit", [str(tmp_path / "pipe"), "--runs", str(tmp_path / "r"), "--shards", str(tmp_path / "s")])


def test_too_little_time(tmp_path: Path) -> None:
    src, options = folder_of(tmp_path / "src", 4), ["--runs", tmp_path, "--shards", tmp_path]
    code, _, errors = fit_in_few_steps(src, *options, "--minutes", "0.01")
    assert code == 2
    assert "--minutes: got 0.01; this machine trains 0 steps in that time" in errors


def test_configs_of_others_are_left_alone(tmp_path: Path) -> None:
    src = folder_of(tmp_path / "src", 4)
    options = ["--runs", str(tmp_path / "runs"), "--shards", str(tmp_path / "shards")]
    (tmp_path / "runs").mkdir()
    config = tmp_path / "runs" / "src.yaml"
    config.write_text("recipe: recommended\n")
    with pytest.raises(UserError, match="is a config that `bfsys fit` did not write"):
        call("fit", [str(src), *options])
    config.write_text(RECORD + json.dumps({"folder": "/elsewhere", "minutes": 10.0, "as_stored": False}))
    with pytest.raises(UserError, match="was chosen for folder '/elsewhere'"):
        call("fit", [str(src), *options])


def test_the_folder_is_a_path() -> None:
    for no_path in (3, None, b"photos"):
        with pytest.raises(UserError, match=f"the folder: got {type(no_path).__name__}; a path is allowed"):
            bfsys.fit(no_path)  # type: ignore[arg-type]
