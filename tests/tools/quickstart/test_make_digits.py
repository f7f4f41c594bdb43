"""The quickstart's data are honest, the same each time, and there either whole or not at all.

The tool is run as its users run it, as a command; two small trees are made once, at the same time.
"""

import csv
import io
import os
import signal
import subprocess
import sys
import time
import wave
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if not all(map(find_spec, ("espeakng_loader", "sklearn"))):  # importing them here would cost every worker seconds
    pytest.skip("needs espeakng-loader and scikit-learn", allow_module_level=True)

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "quickstart" / "make_digits.py"
SMALL = ("--speech-per-class", "10", "--val-speech-per-class", "5", "--image-versions", "2")
HEADER_BYTES = {"tiff": 122, "png": 48, "wav": 44}  # bytes before the first pixel or sample
FILE_BYTES = {"tiff": 378, "png": 340, "wav": 1794}


def start(*arguments: str | Path, before: str = "") -> subprocess.Popen:
    """Start the tool, after the Python statements `before`."""
    command = [sys.executable, TOOL]
    if before:
        run = f"import runpy, sys; {before}; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(TOOL.parent)!r}); "
        run += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", run, TOOL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, errors = process.communicate(timeout=900)
    return process.returncode, output + errors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> tuple[Path, Path]:
    parent = tmp_path_factory.mktemp("digits")
    trees = parent / "first", parent / "second"
    for process in [start(tree, *SMALL) for tree in trees]:
        assert finish(process)[0] == 0
    assert sorted(parent.iterdir()) == sorted(trees)  # no other files are left
    return trees


@pytest.fixture(scope="module")
def files(trees) -> list[dict]:
    """The manifest's rows with the content of each file."""
    with open(trees[0] / "manifest.csv") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "content": (trees[0] / row["path"]).read_bytes()} for row in rows]


def test_manifest_lists_every_file_where_it_is(trees, files):
    found = {path for path in contents(trees[0]) if path not in ("manifest.csv", "complete.json")}
    assert {f["path"] for f in files} == found
    for f in files:
        modality = "speech" if f["encoding"] == "wav" else "image"
        assert f["path"].startswith(f"{f['split']}/{modality}/{f['class']}/")
    assert len({f["class"] for f in files}) == 20
    assert len(files) == 10 * (10 + 5) + 2 * (2 * 1438 + 359)


def test_length_and_header_do_not_reveal_the_class(files):
    for encoding, header_bytes in HEADER_BYTES.items():
        alike = [f["content"] for f in files if f["encoding"] == encoding]
        assert {len(content) for content in alike} == {FILE_BYTES[encoding]}
        assert len({content[:header_bytes] for content in alike}) == 1
        assert len({content[header_bytes:] for content in alike}) > 0.99 * len(alike)


def test_first_64_bytes_and_file_number_are_no_better_than_chance(files):
    """For each feature, class means differ no more than with shuffled classes."""
    rng = np.random.default_rng(0)
    for encoding in HEADER_BYTES:
        train = [f for f in files if f["encoding"] == encoding and f["split"] == "train"]
        labels = np.array([int(f["class"][-1]) for f in train])
        numbers = np.array([[int(Path(f["path"]).stem)] for f in train])
        firsts = np.array([list(f["content"][: 64 if encoding != "png" else 48]) for f in train])
        for features in (numbers, firsts):
            spread = class_spread(features, labels)
            chance = [class_spread(features, rng.permutation(labels)) for _ in range(200)]
            assert spread <= 1.2 * max(chance)


def class_spread(features: np.ndarray, labels: np.ndarray) -> float:
    """The variance between classes as a share of the total variance; the maximum over the features."""
    means = np.stack([features[labels == digit].mean(axis=0) for digit in range(10)])  # [10, features]
    return float((means.var(axis=0) / (features.var(axis=0) + 1e-9)).max())


def test_validation_shares_no_source_and_no_content_with_training(files):
    for encodings, source in ((("wav",), "variant"), (("tiff", "png"), "source_image")):
        sources = {split: {f[source] for f in files if f["split"] == split and f["encoding"] in encodings}
                   for split in ("train", "val")}  # fmt: skip
        assert sources["train"]
        assert sources["val"]
        assert not sources["train"] & sources["val"]
    train = {f["content"] for f in files if f["split"] == "train"}
    assert not [f["path"] for f in files if f["split"] == "val" and f["content"] in train]


def test_variants_that_differ_in_a_final_number_stay_on_one_side(files):
    sides: dict[str, set[str]] = {}
    for f in files:
        if f["variant"]:
            sides.setdefault(f["variant"].lower().rstrip("0123456789"), set()).add(f["split"])
    assert all(len(side) == 1 for side in sides.values())


def test_every_class_has_the_same_number_of_clips_and_voices(files):
    for split, per_class in (("train", 10), ("val", 5)):
        clips = [f for f in files if f["encoding"] == "wav" and f["split"] == split]
        for digit in range(10):
            variants = [f["variant"] for f in clips if f["class"] == f"heard_{digit}"]
            assert len(variants) == len(set(variants)) == per_class


def test_both_encodings_of_an_image_decode_to_the_same_pixels(files):
    pixels: dict[str, dict[str, bytes]] = {}
    for f in files:
        if f["encoding"] != "wav" and f["image_version"] == "0":
            image = Image.open(io.BytesIO(f["content"]))
            assert (image.mode, image.size) == ("L", (16, 16))
            pixels.setdefault(f["source_image"], {})[f["encoding"]] = image.tobytes()
    assert len(pixels) == 1797
    assert all(p["tiff"] == p["png"] for p in pixels.values())


def test_clips_are_wav_files_with_a_word_in_noise(files):
    for f in files:
        if f["encoding"] == "wav":
            with wave.open(io.BytesIO(f["content"])) as file:
                assert file.getparams()[:4] == (1, 1, 5000, 1750)
                samples = np.frombuffer(file.readframes(2800), np.uint8).astype(int) - 128
            assert np.abs(samples).max() > 40  # 0.4 of full scale is 51
            assert len(set(samples[:100])) > 1  # not silent, even before the word
            assert len(set(samples[-100:])) > 1


def test_two_runs_make_identical_trees(trees):
    first, second = (contents(tree) for tree in trees)
    assert first == second


def test_a_complete_tree_is_left_alone_and_other_settings_are_refused(trees):
    before = (trees[0] / "complete.json").stat()
    again, other = start(trees[0], *SMALL), start(trees[0], *SMALL, "--seed", "1")
    status, output = finish(again)
    assert (status, "already there" in output) == (0, True)
    status, output = finish(other)
    assert (status, "made with seed 0, now 1" in output) == (2, True)
    assert (trees[0] / "complete.json").stat() == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    status, output = finish(start(tmp_path, *SMALL))
    assert (status, "no complete result" in output) == (2, True)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("module", ["espeakng_loader", "sklearn.datasets"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, module):
    status, output = finish(start(tmp_path / "out", *SMALL, before=f"sys.modules[{module!r}] = None"))
    assert status == 2
    assert module.replace("sklearn.datasets", "scikit-learn").replace("_", "-") in output
    assert "pip install -e '.[digits]'" in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_runs_that_are_stopped_leave_no_out_and_the_next_run_removes_what_a_killed_one_left(tmp_path):
    stop_while_it_speaks(tmp_path / "out", signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.making-")
    status, output = stop_while_it_speaks(tmp_path / "out", signal.SIGINT)
    assert (status, "Traceback" in output) == (130, False)
    assert not list(tmp_path.iterdir())


def stop_while_it_speaks(out: Path, how: int) -> tuple[int, str]:
    process = start(out, "--image-versions", "1", "--speech-per-class", "100", "--val-speech-per-class", "10")
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # so that it does not end before this process sees that it speaks
    while not list(out.parent.glob(f".out.making-*-{process.pid}/train/speech")):  # then the speaking processes start
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    return finish(process)  # its pipes end only when the speaking processes have ended too
