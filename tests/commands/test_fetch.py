"""Fetching the published datasets, with small replacements: the files that are made, and the errors that are
detected."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from bfsys import fetch
from bfsys.cli import call
from bfsys.errors import UserError
from bfsys.files import try_lock
from tests.commands.packing_helpers import wav_bytes

WORDS = ("yes", "no", "cat", "dog", "bed")  # two of the ten words of the task, and three others
PER_SPLIT = {"train": 20, "val": 10, "test": 10}  # files of each word


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The extracted archive of a small Speech Commands, where tools/fetch.py puts it."""
    folder = tmp_path / "SpeechCommands" / fetch.SPEECH_COMMANDS
    lists: dict[str, list[str]] = {"val": [], "test": []}
    for word in WORDS:
        (folder / word).mkdir(parents=True)
        for split, count in PER_SPLIT.items():
            for i in range(count):
                name = f"{word}/{split}{i:02}_nohash_0.wav"
                (folder / name).write_bytes(wav_bytes(0.1, 16_000))
                if split != "train":
                    lists[split].append(name)
    for name, split in (("validation_list.txt", "val"), ("testing_list.txt", "test")):
        (folder / name).write_text("\n".join(lists[split]) + "\n")
    noise = folder / "_background_noise_"
    noise.mkdir()
    for i in range(2):  # each sample contains its position in the recording
        ramp = np.arange(20 * 16_000, dtype=np.int32) // 10
        soundfile.write(noise / f"noise{i}.wav", ramp.astype(np.int16), 16_000)
    monkeypatch.setattr(fetch, "SPEECH_COMMANDS_CLASSES", len(WORDS))
    monkeypatch.setattr(
        fetch, "SPEECH_COMMANDS_FILES", {split: count * len(WORDS) for split, count in PER_SPLIT.items()}
    )
    return tmp_path


def made(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.wav")}


def test_twelve_classes(archive: Path, capsys: pytest.CaptureFixture) -> None:
    call("fetch", ["speech_commands", str(archive)])
    files = made(archive / "twelve")
    counts = Counter(tuple(name.split("/")[:2]) for name in files)
    assert counts == {
        (split, name): count if name in ("yes", "no") else round(0.1 * 2 * count)
        for split, count in PER_SPLIT.items()
        for name in ("yes", "no", "_unknown_", "_silence_")
    }
    unknown = [name for name in files if "_unknown_" in name]
    assert {Path(name).name.split("-")[0] for name in unknown} <= {"cat", "dog", "bed"}
    for name in files:  # each file keeps its split
        if "_silence_" not in name:
            assert f"{name.split('/')[0]}" in Path(name).name
    assert "next: bfsys pack" in capsys.readouterr().out
    call("pack", [str(archive / "twelve"), str(archive / "packed"), "--name", "twelve", "--workers", "1"])


def test_silence_of_the_splits_and_training_noise_do_not_overlap(archive: Path) -> None:
    call("fetch", ["speech_commands", str(archive)])
    places: dict[str, list[tuple[int, int]]] = {"background": []}
    for path in (archive / "background").glob("*.wav"):
        wave, _ = soundfile.read(path, dtype="int16")
        places["background"].append((wave.min(), wave.max()))
    for split in PER_SPLIT:
        for path in (archive / "twelve" / split / "_silence_").glob("*.wav"):
            wave, rate_hz = soundfile.read(path, dtype="int16")
            assert len(wave) == rate_hz == 16_000
            places.setdefault(split, []).append((wave.min(), wave.max()))
    highest_of_training = max(highest for name in ("train", "background") for _, highest in places[name])
    assert highest_of_training <= min(lowest for lowest, _ in places["val"])
    assert max(highest for _, highest in places["val"]) <= min(lowest for lowest, _ in places["test"])


def test_fetch_is_reproducible_and_does_not_repeat_work(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    call("fetch", ["speech_commands", str(archive)])
    first = made(archive / "twelve")
    call("fetch", ["speech_commands", str(archive)])
    assert "exist already" in capsys.readouterr().out
    (archive / "twelve").rename(tmp_path / "earlier")
    call("fetch", ["speech_commands", str(archive)])
    assert made(archive / "twelve") == first


def test_a_folder_is_fetched_into_by_one_process_and_loses_downloads_of_killed_ones(archive: Path) -> None:
    unfinished = archive / f"{fetch.SPEECH_COMMANDS}.tar.gz.0123.partial"  # as torch.hub names it
    unfinished.write_bytes(b"some")
    with open(archive / ".lock", "ab") as lock:
        assert try_lock(lock)
        with pytest.raises(UserError, match="another process is fetching into this folder"):
            fetch.speech_commands(archive)
        assert unfinished.exists()
    fetch.speech_commands(archive)
    assert not unfinished.exists()


def test_a_copy_that_lacks_something_is_not_used(archive: Path) -> None:
    folder = archive / "SpeechCommands" / fetch.SPEECH_COMMANDS
    (folder / "cat" / "train00_nohash_0.wav").unlink()
    (folder / "dog" / "train00_nohash_0.wav").write_bytes(b"")
    with pytest.raises(UserError) as error:
        call("fetch", ["speech_commands", str(archive)])
    text = str(error.value)
    assert "has 99 files for train, not 100" in text
    assert "dog/train00_nohash_0.wav is empty" in text
    assert f"remove {folder} and run this again" in text
    assert not (archive / "twelve").exists()


def test_an_archive_that_was_fetched_by_other_means_is_unpacked(archive: Path) -> None:
    folder = archive / "SpeechCommands" / fetch.SPEECH_COMMANDS
    with tarfile.open(archive / f"{fetch.SPEECH_COMMANDS}.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")
    folder.rename(archive / "away")
    call("fetch", ["speech_commands", str(archive)])
    assert (archive / "twelve" / "val" / "yes").is_dir()


def test_a_missing_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchaudio.datasets.speechcommands.download_url_to_file", fail)
    with pytest.raises(
        UserError, match=r"could not be downloaded \(no route to host\); get it by other means, put it into"
    ):
        call("fetch", ["speech_commands", str(tmp_path / "new")])


# ------------------------------------------------------------------------------------------------- ImageNet

IDS = ("n00000001", "n00000002")


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with archives like those of ILSVRC2012: 2 classes of 3 files, 4 files for validation."""
    from torchvision.datasets import imagenet  # this import takes two seconds, and every process collects this file

    train = tar_of({f"{i}.tar": tar_of({f"{i}_{n}.JPEG": jpeg(n) for n in range(3)}) for i in IDS})
    val = tar_of({f"ILSVRC2012_val_{n:08}.JPEG": jpeg(n) for n in range(4)})
    known = dict(imagenet.ARCHIVE_META)
    for split, content in (("train", train), ("val", val)):
        name = known[split][0]
        (tmp_path / name).write_bytes(content)
        known[split] = (name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(imagenet, "ARCHIVE_META", known)
    # torchvision's format of the development kit
    torch.save(({i: (i,) for i in IDS}, [IDS[0], IDS[1], IDS[1], IDS[0]]), tmp_path / "meta.bin")
    monkeypatch.setattr(fetch, "IMAGENET_CLASSES", 2)
    monkeypatch.setattr(fetch, "IMAGENET_FILES", {"train": 6, "val": 4})
    return tmp_path


def test_imagenet_is_unpacked_counted_and_can_be_packed(archives: Path, capsys: pytest.CaptureFixture) -> None:
    call("fetch", ["imagenet", str(archives)])
    assert "2 classes, 6 for train, 4 for val" in capsys.readouterr().out
    assert len(list((archives / "val" / IDS[1]).iterdir())) == 2
    packed = archives.parent / f"{archives.name}-packed"
    call("pack", [str(archives), str(packed), "--name", "imagenet", "--from", "imagefolder", "--workers", "1"])
    call("fetch", ["imagenet", str(archives)])  # an existing folder is only checked


def test_an_imagenet_that_lacks_something_is_not_used(archives: Path) -> None:
    call("fetch", ["imagenet", str(archives)])
    (archives / "train" / IDS[0] / f"{IDS[0]}_0.JPEG").unlink()
    (archives / "val" / IDS[0] / "ILSVRC2012_val_00000000.JPEG").write_bytes(b"")
    with pytest.raises(UserError) as error:
        call("fetch", ["imagenet", str(archives)])
    assert "has 5 files for train, not 6" in str(error.value)
    assert "ILSVRC2012_val_00000000.JPEG is empty" in str(error.value)


def test_a_damaged_or_missing_archive_is_named(archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_img_train.tar").write_bytes(b"half")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar is not present in the root directory or is corrup"):
        call("fetch", ["imagenet", str(archives)])
    with pytest.raises(UserError, match="there is no such folder; make it, and put the archives"):
        call("fetch", ["imagenet", str(tmp_path / "nowhere")])
