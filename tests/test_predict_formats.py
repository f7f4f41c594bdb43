"""A model knows the formats of its training files: other files are named, or put into one of them."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

import bfsys
from bfsys.checkpoint.files import MANIFEST, fingerprint
from bfsys.checkpoint.loading import newest_readable
from bfsys.cli import call
from bfsys.errors import UserError
from bfsys.out_of_distribution import ReferenceFiles
from tests.conftest import _run_ranks, tiny_config
from tests.test_augmented import write_files

FORMATS = ("tiff of 8 × 8 pixels", "wav:uint8 of 0.06 s at 1,000 Hz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files and runs/tiny, whose pictures are packed as TIFF and whose sounds are augmented into WAV."""
    folder = tmp_path_factory.mktemp("formats")
    write_files(folder / "files")
    common = [str(folder / "files"), str(folder), "--workers", "1"]
    call("pack", [*common, "--subdir", "image", "--name", "image", "--encoding", "tiff", "--image-size", "8"])
    call("pack", [*common, "--subdir", "audio", "--name", "audio"])
    config = tiny_config(folder, folder)
    augment = {"encoding": "wav:uint8", "sample_rate_hz": 1000, "seconds": 0.06}
    config["data"]["sources"] = [{"path": str(folder / "image")}, {"path": str(folder / "audio"), "augment": augment}]
    config["train"]["steps"] = 3
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (result,) = _run_ranks(1, ["bfsys/train.py", str(folder / "tiny.yaml")])
    assert result.returncode == 0, result.stderr
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    Image.fromarray(pixels).save(folder / "large.tiff")
    soundfile.write(folder / "clip.wav", 0.5 * np.sin(np.arange(300) * 0.3), 4000, subtype="PCM_16")
    (folder / "notes.txt").write_text("neither a picture nor a sound")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:200])
    for name, options in (
        ("image", ["--encoding", "tiff", "--image-size", "8"]),
        ("audio", ["--encoding", "wav:uint8", "--sample-rate", "1000", "--seconds", "0.06"]),
    ):
        source = folder / ("photo.jpg" if name == "image" else "clip.wav")
        call("encode", [str(source), str(folder / "made"), *options])
    return folder


@pytest.fixture(autouse=True)
def every_file_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are about formats, and the files are few and unlike each other."""
    monkeypatch.setattr(ReferenceFiles, "score", lambda self, data: 0.0)


def files(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


def answers(text: str) -> list[list[dict]]:
    return [answer["top"] for answer in json.loads(text)]


@pytest.mark.parametrize(
    ("name", "made", "what"),
    [
        ("photo.jpg", "photo.tiff", "is a JPEG"),
        ("large.tiff", None, "is a TIFF of another size or make"),
        ("clip.wav", "clip.wav", "is a WAV of another size or make"),
        ("notes.txt", None, "is not a picture or sound of a known format"),
    ],
)
def test_files_in_another_format_are_named_and_encoded(
    name: str, made: str | None, what: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    run, path = str(folder / "runs" / "tiny"), str(folder / name)
    call("predict", [run, path, path, "--json"])
    captured = capsys.readouterr()
    as_they_are = answers(captured.out)
    assert captured.err == (
        f"{path} {what}, but {run} was trained on {' and '.join(FORMATS)}, so the prediction may be unreliable; "
        "add --encode (encode=True in Python)\n"
    )
    if name == "notes.txt":
        return
    call("predict", [run, path, "--encode", "--json"])
    captured = capsys.readouterr()
    encoded = answers(captured.out)
    assert captured.err == ""
    assert encoded[0] != as_they_are[0]
    if made:
        for option in ((), ("--encode",)):  # files in the model's format stay unchanged
            call("predict", [run, str(folder / "made" / made), "--json", *option])
            captured = capsys.readouterr()
            assert (answers(captured.out), captured.err) == (encoded, "")


def test_files_that_cannot_be_encoded_are_named_and_the_others_answered(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError) as error:
        call(
            "predict", [str(folder / "runs" / "tiny"), *files(folder, "cut.jpg", "photo.jpg", "notes.txt"), "--encode"]
        )
    cut, text, total = error.value.problems
    assert cut.startswith(f"{folder / 'cut.jpg'}: cannot be decoded as image: ")
    assert text.startswith(
        f"{folder / 'notes.txt'}: cannot be decoded as image: is not an image that Pillow can read; "
    )
    assert "; cannot be decoded as audio: is not a sound" in text
    assert total == "2 problems; 1 file classified"
    assert capsys.readouterr().out.startswith(f"{folder / 'photo.jpg'}: ")


def test_python_warns_and_encodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bfsys.load(folder / "runs" / "tiny")
    assert model.input_formats == FORMATS
    assert " or ".join(FORMATS) in repr(model)
    photo, clip = (folder / "photo.jpg").read_bytes(), folder / "clip.wav"
    with pytest.warns(
        UserWarning, match=r"inputs\[0\] is a JPEG, but .*, so the prediction may be unreliable; add --encode"
    ) as noted:
        as_they_are = model.probabilities([photo, clip])
    assert len(noted) == 1
    assert noted[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = model.probabilities([photo, clip], encode=True)
        made = model.probabilities(files(folder / "made", "photo.tiff", "clip.wav"))
        assert model.embed(photo, encode=True).shape == (16,)
        assert model.predict(clip, encode=True)[0].probability == pytest.approx(
            made[1].max(), rel=1e-5
        )  # batches differ
        with ThreadPoolExecutor(4) as pool:  # decoding changes warning filters and PyTorch's threads
            before = list(warnings.filters), torch.get_num_threads()
            found = list(pool.map(lambda _: model.probabilities([photo, clip], encode=True), range(8)))
        assert (list(warnings.filters), torch.get_num_threads()) == before
    assert all(np.array_equal(answer, made) for answer in (encoded, *found))
    assert not np.array_equal(as_they_are, made)


def test_an_export_records_the_input_formats(folder: Path, tmp_path: Path) -> None:
    call("export", [str(folder / "runs" / "tiny"), str(tmp_path / "out"), "--format", "safetensors"])
    assert bfsys.load(tmp_path / "out").input_formats == FORMATS
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["input_formats"] == [
        {"encoding": "tiff", "image_size": 8, "sample_rate_hz": None, "seconds": None},
        {"encoding": "wav:uint8", "image_size": None, "sample_rate_hz": 1000, "seconds": 0.06},
    ]


@pytest.mark.parametrize("age", ["older", "newer", "mixed"])
def test_no_note_is_printed_if_formats_are_not_known(
    age: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The cases are a checkpoint without recorded formats, one with an unknown encoding, and one with training files as
    stored."""
    path, manifest, _ = newest_readable(folder / "runs" / "tiny")
    assert path is not None
    formats = manifest.pop("input_formats")
    if age != "older":
        formats[1]["encoding"] = "opus:9" if age == "newer" else "as_stored"
        manifest["input_formats"] = formats[1:] if age == "newer" else formats
    copy = tmp_path / path.name
    copy.mkdir()
    for name in manifest["files"]:
        (copy / name).symlink_to(path / name)
    (copy / MANIFEST).write_text(json.dumps(manifest | {"sha256": fingerprint(manifest)}))
    call("predict", [str(copy), *files(folder, "photo.jpg", "clip.wav", "notes.txt")])
    captured = capsys.readouterr()
    assert (captured.err, len(captured.out.splitlines())) == ("", 3)
    if age != "mixed":
        with pytest.raises(UserError, match="no format is known to encode files in"):
            call("predict", [str(copy), str(folder / "photo.jpg"), "--encode"])
        return
    model = bfsys.load(copy)
    assert f"reads {model.input_formats[0]} or other files, with positions for" in repr(model)
    inputs = [folder / "photo.jpg", folder / "clip.wav", folder / "notes.txt"]
    encoded, as_they_are = model.probabilities(inputs, encode=True), model.probabilities(inputs)
    assert [np.array_equal(e, a) for e, a in zip(encoded, as_they_are, strict=True)] == [False, True, True]


def test_options_that_exclude_each_other(folder: Path) -> None:
    with pytest.raises(UserError, match="--encode: files that were transformed before cannot be decoded"):
        call("predict", [str(folder / "runs" / "tiny"), str(folder / "photo.jpg"), "--encode", "--transformed"])


def test_explain_names_the_format_of_the_first_such_file_only(folder: Path, capsys: pytest.CaptureFixture) -> None:
    photos = [folder / "photos" / f"{name}.jpg" for name in "ab"]
    photos[0].parent.mkdir()
    for photo in photos:
        photo.write_bytes((folder / "photo.jpg").read_bytes())
    call("explain", [str(folder / "runs" / "tiny"), *map(str, photos), "--out", str(folder / "pages")])
    notes = [line for line in capsys.readouterr().err.splitlines() if "was trained on" in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"{photos[0]} is a JPEG, but ")
