"""Every kind of input gives the same bytes, and what cannot be read is named."""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bfsys import inputs
from bfsys.data.media.input_formats import input_format
from bfsys.data.streaming.byte_transforms import parse_transforms
from bfsys.errors import UserError
from bfsys.inputs import Input, Reader, files_in, is_one, named, read_input
from tests.commands.packing_helpers import wav_bytes

CONTENT = bytes(range(50))


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not len(read_input("pipe", tmp_path / "pipe"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    return tmp_path / "file.bin"


@pytest.mark.parametrize(
    "kind",
    [
        str,
        lambda path: path,
        lambda path: CONTENT,
        lambda path: bytearray(CONTENT),
        lambda path: memoryview(CONTENT),
        lambda path: memoryview(b"".join(bytes([b, 0]) for b in CONTENT))[::2],
        lambda path: np.frombuffer(CONTENT, np.uint8),
        lambda path: np.repeat(np.frombuffer(CONTENT, np.uint8), 2)[::2],
        lambda path: io.BytesIO(CONTENT),
        lambda path: open(path, "rb"),  # noqa: SIM115
        lambda path: open(path, "rb", buffering=0),  # noqa: SIM115
    ],
)
def test_all_kinds_of_input_are_their_bytes(kind: Callable[[Path], Input], path: Path) -> None:
    one = kind(path)
    assert is_one(one)
    ((name, found),) = named(one)
    data = read_input(name, found)
    assert (data.dtype, data.ndim, data.tobytes()) == (np.uint8, 1, CONTENT)


def test_an_open_file_is_read_from_its_position(path: Path) -> None:
    with open(path, "rb") as file:
        file.seek(10)
        assert read_input("x", file).tobytes() == CONTENT[10:]
        assert read_input("x", file).tobytes() == b""


def test_several_inputs_are_named_by_path_or_place(path: Path) -> None:
    with open(path, "rb") as file:
        many = (one for one in (path, str(path), CONTENT, file))
        assert not is_one(many)
        assert [name for name, _ in named(many)] == [str(path), str(path), "inputs[2]", f"inputs[3] ({path})"]
    assert list(named([])) == []
    assert next(named(b"one"))[0] == "the input"


@pytest.mark.parametrize("numbers", [list(CONTENT), array("B", CONTENT), list(np.frombuffer(CONTENT, np.uint8))])
def test_the_numbers_of_one_file_are_one_problem(numbers: list[int]) -> None:
    with pytest.raises(UserError, match=r"^inputs\[0\]: got a number; .* pass bytes\(…\)$"):
        list(named(numbers))  # type: ignore[arg-type]


def closed_file(path: Path) -> io.BufferedReader:
    with open(path, "rb") as file:
        return file


def sparse_file(path: Path) -> Path:
    """More than a machine's memory."""
    with open(path.with_name("sparse"), "wb") as file:
        file.truncate(2**42)
    return path.with_name("sparse")


def pipe_that_does_not_block(path: Path) -> io.BufferedReader:
    path = path.with_name("pipe")
    os.mkfifo(path)
    return open(os.open(path, os.O_RDWR | os.O_NONBLOCK), "rb")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda path: "some text", "some text: cannot be read: No such file or directory; if this is content and no"),
        (lambda path: "long " * 100, "^(long ){40}…: cannot be read: File name too long; if this is content and no"),
        (lambda path: "nul\0", "nul\0: cannot be read: embedded null byte; if this is content and not a path"),
        (lambda path: path.parent / "none", r"none: cannot be read: No such file or directory$"),
        (lambda path: path.parent, r"is a folder; pass its files: bfsys\.files_in\('.*'\)$"),
        (lambda path: np.zeros(3), r"the input: got an array float64 \[3\]; allowed is uint8 \[n\]$"),
        (lambda path: np.zeros((3, 2), np.uint8), r"got an array uint8 \[3, 2\]; allowed is uint8 \[n\]$"),
        (lambda path: np.array("text"), r"got an array <U4 \[\]"),
        (lambda path: memoryview(np.zeros(3, np.int32)), r"got a memoryview of 'i' \[3\]; allowed is one of bytes"),
        (lambda path: torch.zeros(3), "got torch.Tensor; allowed is a path, bytes, a NumPy array uint8"),
        (lambda path: 7, "the input: got int; allowed is a path"),
        (lambda path: None, "the input: got NoneType; allowed is a path"),
        (closed_file, r"the input \(.*file\.bin\): is a closed file; pass it while it is open, or pass its path$"),
        (lambda path: open(path), r"its read\(\) gives str; open it in binary mode: open\(path, 'rb'\)$"),  # noqa: SIM115
        (lambda path: open(path, "ab"), r"is open for writing only; open it with open\(path, 'rb'\)$"),  # noqa: SIM115
        (lambda path: Path("/dev/zero"), "^/dev/zero: has more than 3,000,000 bytes; allowed are 3,000,000"),
        (lambda path: open("/dev/zero", "rb"), r"\(/dev/zero\): has more than 3,000,000 bytes"),  # noqa: SIM115
        (sparse_file, "sparse: has more than 3,000,000 bytes"),
        (pipe_that_does_not_block, r"the input: cannot be read: Resource temporarily unavailable$"),
        (lambda path: io.StringIO("text"), r"its read\(\) gives str; open it in binary mode"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_be_read_are_named(
    wrong: Callable[[Path], Input], told: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MOST_BYTES", 3_000_000)
    ((name, one),) = named(wrong(path))
    with pytest.raises(UserError, match=told) as error:
        read_input(name, one)
    assert len(error.value.problems) == 1
    assert len(str(error.value)) < 400


def test_a_file_may_take_half_of_the_free_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SMALL_BYTES", 0)
    monkeypatch.setattr(inputs, "free_memory_bytes", lambda: 2000)
    path.write_bytes(bytes(1000))
    assert len(read_input("x", path)) == 1000
    path.write_bytes(bytes(1001))
    with pytest.raises(UserError, match=r"x: has more than 1,000 bytes; allowed are .* half of the memory that is"):
        read_input("x", path)


def test_a_file_opened_as_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xff")
    with open(path, encoding="utf-8") as file, pytest.raises(UserError, match="open it in binary mode"):
        read_input("x", file)  # type: ignore[arg-type]


def test_the_files_of_a_folder(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"a")
    (tmp_path / ".hidden").write_bytes(b"a")
    assert files_in(tmp_path) == [str(tmp_path / "deep" / "a"), str(path)]
    assert ".hidden" in capsys.readouterr().err
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match="nowhere: is not a regular file"):
        files_in(tmp_path)
    with pytest.raises(UserError, match=r"file\.bin: is not a folder"):
        files_in(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: a folder without files"):
        files_in(tmp_path / "empty")


def test_a_sound_for_a_model_of_pictures() -> None:
    formats = (input_format("tiff", {"image_size": 8}), input_format("png", {}))
    reader = Reader("runs/x", formats, reads_any_format=False, transforms=(), least_bytes=1)
    problems: list[str] = []
    notes: list[str] = []
    (sample,) = reader.samples([("a.wav", wav_bytes(0.1, 8_000))], problems, notes.append, encode=False)
    assert sample.data.tobytes() == wav_bytes(0.1, 8_000)
    told = "a.wav is a WAV, but runs/x was trained on tiff of 8 × 8 pixels and png, so the prediction may be unreliable"
    assert (notes, problems) == ([told], [])
    assert list(reader.samples([("a.wav", wav_bytes(0.1, 8_000))], problems, notes.append, encode=True)) == []
    assert problems == ["a.wav: is a WAV, and runs/x was trained on tiff of 8 × 8 pixels and png"]


def test_a_model_of_the_first_bytes_reads_no_more_of_a_file(path: Path) -> None:
    """The file holds more bytes than an input may have, and more than the memory."""
    reader = Reader("runs/x", (), reads_any_format=True, transforms=parse_transforms(["head:40"]), least_bytes=1)
    large = sparse_file(path)
    with open(large, "rb") as file:
        file.seek(2**42 - 50)
        inputs = [(str(large), large), ("open", file), ("short", path), ("stream", open("/dev/zero", "rb"))]  # noqa: SIM115
        problems: list[str] = []
        samples = list(reader.samples(inputs, problems, lambda _: None, encode=False))
    assert problems == []
    assert [sample.data.tobytes() for sample in samples] == [bytes(40), bytes(40), CONTENT[:40], bytes(40)]
    # The format of a file may depend on all of its bytes.
    mixed = replace(reader, formats=(input_format("tiff", {}),))
    for encode, reader in ((True, mixed), (False, replace(mixed, reads_any_format=False))):
        assert list(reader.samples([("large", large)], problems, lambda _: None, encode=encode)) == []
        assert "large: has more than" in problems.pop()
    # If files need none of the formats, they are not compared with them.
    (sample,) = mixed.samples([("large", large)], problems, lambda _: None, encode=False)
    assert (sample.data.tobytes(), problems) == (bytes(40), [])
