"""`bfsys encode` writes files in the form that a model reads, and `bfsys make-key` makes keys."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bfsys import encode
from bfsys.cli import call
from bfsys.data.media.encodings import Fitting, parse_encoding
from bfsys.data.streaming.byte_transforms import parse_transforms, read_key
from bfsys.errors import UserError
from bfsys.files import try_lock
from tests.commands.packing_helpers import make_files, png_bytes, wav_bytes


def made_in(folder: Path) -> list[str]:
    """The files without hidden ones, which packing and prediction ignore."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(str(path.relative_to(folder)) for path in paths)


def test_a_folder_keeps_its_tree(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"red/a.png": png_bytes(40, 30, 250), "blue/deep/b.png": png_bytes(30, 40, 3)})
    call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff", "--image-size", "16"])
    assert made_in(tmp_path / "out") == ["blue/deep/b.tiff", "red/a.tiff"]
    with Image.open(tmp_path / "out" / "red" / "a.tiff") as image:
        assert image.format == "TIFF"
        assert image.size == (16, 16)
        assert image.getpixel((5, 5)) == (250, 0, 0)


def test_what_decoding_drops_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    src = make_files(
        tmp_path / "src", {"a.gif": frames.getvalue(), "b.gif": frames.getvalue(), "c.png": png_bytes(4, 4, 1)}
    )
    call("encode", [str(src), str(tmp_path / "out"), "--encoding", "png"])
    assert capsys.readouterr().err == (
        "note: 2 of 3 files have more frames than the first, which is the only one that is used\n"
    )


def test_transforms_of_files_as_they_are_and_encoded(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    call("make-key", [str(key)])
    content = bytes(range(200)) * 3
    make_files(tmp_path, {"any.bin": content, "photo.png": png_bytes(50, 50, 9)})
    call("encode", [str(tmp_path / "any.bin"), str(tmp_path / "out"), "--transform", f"permute:{key}"])
    hidden = np.frombuffer((tmp_path / "out" / "any.bin").read_bytes(), np.uint8)
    assert np.array_equal(hidden, read_key(key)[np.frombuffer(content, np.uint8)])
    camera = ["--encoding", "fhwc", "--image-size", "32", "--transform", "keep:0.1", "--transform", "reverse"]
    call("encode", [str(tmp_path / "photo.png"), str(tmp_path / "out"), *camera])
    assert (tmp_path / "out" / "photo.fhwc").stat().st_size == int(0.1 * 32 * 32 * 3)


def test_noise_is_another_one_each_time(tmp_path: Path) -> None:
    make_files(tmp_path, {"any.bin": bytes(1000)})
    for name in ("one", "two"):
        call("encode", [str(tmp_path / "any.bin"), str(tmp_path / name), "--transform", "noise:-9:9"])
    assert (tmp_path / "one" / "any.bin").read_bytes() != (tmp_path / "two" / "any.bin").read_bytes()


def test_all_problems_are_reported_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.png": b"", "a.PNG": b""})
    with pytest.raises(UserError) as error:
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tif", "--transform", "permut"])
    assert "did you mean 'tiff'?" in str(error.value)
    assert "did you mean 'permute'?" in str(error.value)
    with pytest.raises(UserError, match=r"a\.png: would become .*a-png\.tiff, as .*a\.PNG does; rename one of them"):
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no such file or folder"):
        call("encode", [str(tmp_path / "none"), str(tmp_path / "out")])


def test_files_that_differ_in_the_extension_alone_all_become_files(tmp_path: Path) -> None:
    names = ("a/x.jpg", "a/x.png", "b/x.png", "a/x.y.png", "a/x")
    src = make_files(tmp_path / "src", {name: png_bytes(9, 9, i) for i, name in enumerate(names)})
    call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff"])
    assert made_in(tmp_path / "out") == ["a/x-jpg.tiff", "a/x-png.tiff", "a/x.tiff", "a/x.y.tiff", "b/x.tiff"]
    with Image.open(tmp_path / "out" / "a" / "x-png.tiff") as image:
        assert image.getpixel((0, 0)) == (1, 0, 0)


def test_files_that_cannot_be_decoded_are_named_and_the_others_made(tmp_path: Path) -> None:
    whole = wav_bytes(0.5, 16_000)
    src = make_files(tmp_path / "src", {"a.wav": b"RIFFxxxx", "b.wav": whole, "c.wav": whole[:-9]})
    with pytest.raises(UserError) as error:
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "wav:uint8", "--seconds", "1"])
    first, second, total = error.value.problems
    assert first.startswith(f"{src}/a.wav: cannot be decoded as audio: is not a sound that libsndfile can read")
    assert second.startswith(f"{src}/c.wav: cannot be decoded as audio: is truncated")
    assert total == "2 of 3 files were not written; run the same command again to continue"
    assert (tmp_path / "out" / "b.wav").stat().st_size == 16_044


def test_a_sound_whose_rate_a_format_lacks_is_named_with_the_remedy(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.wav": wav_bytes(0.5, 96_000), "b.wav": wav_bytes(0.5, 16_000)})
    with pytest.raises(UserError) as error:
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "mp3"])
    first, total = error.value.problems
    assert first.startswith(f"{src}/a.wav: cannot be converted to mp3: MP3 of 96,000 Hz cannot be written (")
    assert first.endswith("48000); resample it first (--sample-rate of bfsys pack and encode)")
    assert total == "1 of 2 files were not written; run the same command again to continue"
    call("encode", [str(src), str(tmp_path / "resampled"), "--encoding", "mp3", "--sample-rate", "16000"])


def test_a_name_that_is_too_long_for_another_extension_is_named_and_the_others_made(tmp_path: Path) -> None:
    png = png_bytes(9, 9, 1)
    src = make_files(tmp_path / "src", {"a.png": png, f"{'b' * 252}.pn": png, "c.png": png})
    for _ in range(2):
        with pytest.raises(UserError) as error:
            call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff"])
        long, total = error.value.problems
        assert long.endswith("b.tiff: cannot be written: File name too long")
        assert total == "1 of 3 files were not written; run the same command again to continue"


def test_running_out_of_memory_is_not_blamed_on_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(encode, "reencode", fail)
    src = make_files(tmp_path / "src", {"a.png": png_bytes(9, 9, 1)})
    with pytest.raises(UserError, match=r"a\.png: not enough memory for this file"):
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff"])


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a command that was stopped while it made the second of three files."""
    src = make_files(tmp_path / "src", {f"{name}.png": png_bytes(9, 9, i) for i, name in enumerate("abc")})
    command = [str(src), str(tmp_path / "out"), "--encoding", "fhwc", "--transform", "noise:-9:9"]
    contents = iter([encode.reencode((src / "a.png").read_bytes(), parse_encoding("fhwc"), Fitting())])

    def stop(*_: object) -> bytes:
        for content in contents:
            return content
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "reencode", stop)
        with pytest.raises(KeyboardInterrupt):
            call("encode", command)
    assert made_in(tmp_path / "out") == ["a.fhwc"]
    return command


def test_the_same_command_continues_after_a_stop(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = (tmp_path / "out" / "a.fhwc").read_bytes()
    call("encode", stopped)
    assert capsys.readouterr().out == f"{tmp_path}/out: 2 files, and 1 from an earlier start\n"
    assert made_in(tmp_path / "out") == ["a.fhwc", "b.fhwc", "c.fhwc"]
    assert (tmp_path / "out" / "a.fhwc").read_bytes() == first  # if it were made again, it would have other noise


def test_a_file_that_is_noted_and_missing_is_made(stopped: list[str], tmp_path: Path) -> None:
    (tmp_path / "out" / "a.fhwc").unlink()
    call("encode", stopped)
    assert made_in(tmp_path / "out") == ["a.fhwc", "b.fhwc", "c.fhwc"]


def test_incomplete_notes_are_ignored(stopped: list[str], tmp_path: Path) -> None:
    notes = tmp_path / "out" / encode.NOTES
    notes.write_bytes(notes.read_bytes() + b'["b.fhwc", "12')
    call("encode", stopped)
    call("encode", stopped)
    assert made_in(tmp_path / "out") == ["a.fhwc", "b.fhwc", "c.fhwc"]


def test_files_made_with_other_settings_are_not_overwritten(stopped: list[str], tmp_path: Path) -> None:
    message = r"a\.fhwc: exists and is not overwritten, since it was not made from the current .*a\.png with these"
    other_source = make_files(tmp_path / "other", {"a.png": png_bytes(9, 9, 7)})
    for command in ([str(other_source), *stopped[1:]], [*stopped[:-1], "noise:-8:8"], [*stopped, "--image-size", "9"]):
        with pytest.raises(UserError, match=message):
            call("encode", command)
    (tmp_path / "src" / "a.png").write_bytes(png_bytes(10, 9, 0))
    with pytest.raises(UserError, match=message):
        call("encode", stopped)
    (tmp_path / "out" / encode.NOTES).unlink()
    with pytest.raises(UserError, match="exists and is not overwritten"):
        call("encode", stopped)
    assert made_in(tmp_path / "out") == ["a.fhwc"]


def test_unfinished_files_of_a_killed_process_are_removed(stopped: list[str], tmp_path: Path) -> None:
    make_files(tmp_path / "out", {".b.fhwc.123.tmp": b"part", ".mine.123.tmp": b"of the user", ".b.fhwc.x.tmp": b"too"})
    call("encode", stopped)
    hidden = sorted(path.name for path in (tmp_path / "out").glob(".*"))
    assert hidden == [".b.fhwc.x.tmp", encode.NOTES, ".mine.123.tmp"]


def test_two_processes_do_not_encode_into_one_folder(stopped: list[str], tmp_path: Path) -> None:
    with open(tmp_path / "out" / encode.NOTES, "rb") as other:
        assert try_lock(other)
        with pytest.raises(UserError, match="out: another process is encoding into this folder; wait until it has"):
            call("encode", stopped)
    call("encode", stopped)
    with open(tmp_path / "out" / encode.NOTES, "rb") as other:
        assert try_lock(other)
        call("encode", stopped)  # nothing remains to be made


def test_a_file_that_another_process_makes_at_the_same_time_is_kept(
    stopped: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    really_read, calls = encode.Notes.read, iter(range(99))

    def read(notes: encode.Notes) -> None:
        really_read(notes)
        if next(calls) == 0:  # after this process has read the notes, another one ends
            call("encode", stopped)

    monkeypatch.setattr(encode.Notes, "read", read)
    call("encode", stopped)
    assert capsys.readouterr().out.endswith("out: 0 files, and 3 from an earlier start\n")


def test_notes_reveal_neither_paths_nor_keys(tmp_path: Path) -> None:
    call("make-key", [str(tmp_path / "my.key")])
    make_files(tmp_path / "private", {"any.bin": b"1"})
    command = [str(tmp_path / "private"), str(tmp_path / "out"), "--transform", f"permute:{tmp_path}/my.key"]
    call("encode", command)
    notes = (tmp_path / "out" / encode.NOTES).read_text()
    assert "any.bin" in notes
    assert not any(word in notes for word in ("private", "my.key", "permute", str(tmp_path)))
    (tmp_path / "my.key").unlink()
    call("make-key", [str(tmp_path / "my.key")])
    with pytest.raises(UserError, match=r"any\.bin: exists and is not overwritten"):
        call("encode", command)


def test_write_errors_are_reported_with_decoding_errors(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.png": b"none", "b/c.png": png_bytes(9, 9, 1), "d.png": png_bytes(9, 9, 1)})
    make_files(tmp_path / "out", {"b": b"a file in the place of a folder"})
    with pytest.raises(UserError) as error:
        call("encode", [str(src), str(tmp_path / "out"), "--encoding", "tiff"])
    first, second, total = error.value.problems
    assert "a.png: cannot be decoded" in first
    assert second.startswith(f"{tmp_path}/out/b/c.tiff: cannot be written: ")
    assert total.startswith("3 of 3 files were not written")


def test_a_folder_is_not_encoded_into_itself(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.png": png_bytes(9, 9, 1)})
    for out in (src, src / "deep" / "out"):
        with pytest.raises(UserError, match=r"is inside .*src, so its files .*; choose an OUT outside"):
            call("encode", [str(src), str(out), "--encoding", "tiff"])
    assert made_in(src) == ["a.png"]


def test_a_key_is_not_overwritten(tmp_path: Path) -> None:
    call("make-key", [str(tmp_path / "key")])
    with pytest.raises(UserError, match="exists and is not overwritten"):
        call("make-key", [str(tmp_path / "key")])


def test_one_known_file_reveals_the_key_for_its_values() -> None:
    """docs/privacy.md says that `permute` is a substitution, not a cipher."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    clear = np.frombuffer(file.getvalue(), np.uint8)
    (permute,) = parse_transforms(["permute"])
    hidden = permute.apply(clear, rng)
    guessed = np.zeros(256, np.uint8)
    guessed[clear] = hidden
    other = rng.integers(0, 256, 5000, dtype=np.uint8)
    assert np.array_equal(guessed[other], permute.apply(other, rng))
