"""Files as a model is given them, made outside of it; keys."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bfsys.data.byte_transforms import parse_transforms, read_key
from bfsys.errors import UserError
from tests.tools.packing_helpers import make_files, png_bytes, wav_bytes
from tools import encode, make_key


def test_a_folder_keeps_its_tree(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"red/a.png": png_bytes(40, 30, 250), "blue/deep/b.png": png_bytes(30, 40, 3)})
    encode.main([str(src), str(tmp_path / "out"), "--encoding", "tiff", "--image-size", "16"])
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["blue/deep/b.tiff", "red/a.tiff"]
    with Image.open(tmp_path / "out" / "red" / "a.tiff") as image:
        assert image.format == "TIFF"
        assert image.size == (16, 16)
        assert image.getpixel((5, 5)) == (250, 0, 0)


def test_transforms_of_files_as_they_are_and_anew(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    make_key.main([str(key)])
    content = bytes(range(200)) * 3
    make_files(tmp_path, {"any.bin": content, "photo.png": png_bytes(50, 50, 9)})
    encode.main([str(tmp_path / "any.bin"), str(tmp_path / "out"), "--transform", f"permute:{key}"])
    hidden = np.frombuffer((tmp_path / "out" / "any.bin").read_bytes(), np.uint8)
    assert np.array_equal(hidden, read_key(key)[np.frombuffer(content, np.uint8)])
    camera = ["--encoding", "fhwc", "--image-size", "32", "--transform", "keep:0.1", "--transform", "reverse"]
    encode.main([str(tmp_path / "photo.png"), str(tmp_path / "out"), *camera])
    assert (tmp_path / "out" / "photo.fhwc").stat().st_size == int(0.1 * 32 * 32 * 3)


def test_noise_is_another_one_each_time(tmp_path: Path) -> None:
    make_files(tmp_path, {"any.bin": bytes(1000)})
    for name in ("one", "two"):
        encode.main([str(tmp_path / "any.bin"), str(tmp_path / name), "--transform", "noise:-9:9"])
    assert (tmp_path / "one" / "any.bin").read_bytes() != (tmp_path / "two" / "any.bin").read_bytes()


def test_everything_wrong_is_told_at_once_and_nothing_written(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.png": b"", "a.jpg": b""})
    with pytest.raises(UserError) as error:
        encode.main([str(src), str(tmp_path / "out"), "--encoding", "tif", "--transform", "permut"])
    assert "did you mean tiff?" in str(error.value)
    assert "did you mean permute?" in str(error.value)
    with pytest.raises(UserError, match=r"a\.png: would become .*a\.tiff, as another file does"):
        encode.main([str(src), str(tmp_path / "out"), "--encoding", "tiff"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no such file or folder"):
        encode.main([str(tmp_path / "none"), str(tmp_path / "out")])


def test_a_file_that_cannot_be_decoded_is_named_and_the_others_made(tmp_path: Path) -> None:
    src = make_files(tmp_path / "src", {"a.wav": b"RIFFxxxx", "b.wav": wav_bytes(0.5, 16_000)})
    with pytest.raises(UserError, match=r"a\.wav: cannot be decoded as audio"):
        encode.main([str(src), str(tmp_path / "out"), "--encoding", "wav:uint8", "--seconds", "1"])
    assert (tmp_path / "out" / "b.wav").stat().st_size == 16_044


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_files(tmp_path, {"any.bin": b"1"})
    encode.main([str(tmp_path / "any.bin"), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"any\.bin: exists and is not overwritten"):
        encode.main([str(tmp_path / "any.bin"), str(tmp_path / "out")])
    make_key.main([str(tmp_path / "key")])
    with pytest.raises(UserError, match="exists and is not overwritten"):
        make_key.main([str(tmp_path / "key")])


def test_who_knows_one_file_knows_the_key_of_its_values() -> None:
    """What docs/privacy.md says of `permute`: it is a substitution, not a cipher."""
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
