"""Pages hold everything that they need and nothing that a file could have put into them."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bfsys.answers import Prediction
from bfsys.explain import overlay, page
from bfsys.explain.explanation import Explanation, Part, Window, Without
from bfsys.explain.ranges import Range
from bfsys.explain.structure import structure
from tests.explain.tiny import png_file, wav_file

EVIL = '"><script>alert(1)</script>'
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 21, 3), dtype=np.uint8)


def explained(content: bytes, gradients: np.ndarray | None = None) -> Explanation:
    data = np.frombuffer(content, np.uint8)
    found = structure(data)
    one = Prediction(f"class {EVIL}", 0, 0.75)
    size = max(1, len(data) // 9)
    return Explanation(
        name=f"file {EVIL}",
        stored=data,
        data=data,
        format=found.format,
        explained=one,
        predictions=[one, Prediction("other", 1, 0.25)],
        windows=tuple(Window(i, min(i + size, len(data)), RNG.normal()) for i in range(0, len(data), size)),
        gradients=RNG.normal(size=len(data)).astype(np.float32) if gradients is None else gradients,
        parts=tuple(Part(r, 1 / len(found.ranges)) for r in found.ranges),
        without=Without(found.ranges[0].name, (Prediction("other", 1, 0.5), one), 0.4),
        reference="4 validation files",
        notes=(f"note {EVIL}",),
    )


class Checker(HTMLParser):
    """Checks that elements are closed in order, that nothing is loaded from other servers, and that no script runs."""

    EMPTY = ("meta", "img", "br", "rect", "line", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value
                assert value.startswith("data:image/")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def checked(explanation: Explanation) -> str:
    text = page.html(explanation)
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert "<script" not in text
    assert "alert(1)&lt;/script&gt;" in text
    assert not re.search(r"url\(|@import|https?://", text)
    return text


@pytest.mark.parametrize(
    "content",
    [
        png_file(GREY, EVIL), wav_file(GREY[0], EVIL.encode()), b"<script>text</script>", bytes(range(256)) * 3, b"x",
        b"\x89PNG\r\n\x1a\n\0\0\0\0IDAT", b"RIFF\0\0\0\0WAVEfmt ", b"II*\0\x08\0\0\0" + bytes(100),
        b"P5 9 9 255\nshort",
    ],
)  # fmt: skip
def test_a_page_is_whole_and_safe(content: bytes) -> None:
    text = checked(explained(content))
    assert f"{len(content):,} bytes" in text
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_the_page_says_if_there_is_no_evidence() -> None:
    e = explained(bytes(100), np.zeros(100, np.float32))
    e = replace(e, parts=tuple(replace(p, share=0.0) for p in e.parts), windows=(Window(0, 100, 0.0),))
    assert "no byte is evidence for" in checked(e)


def test_many_small_parts_are_evidence_for_a_class_together() -> None:
    e = explained(bytes(60))
    ranges = [Range(i, i + 1, f"chunk {i}", "content") for i in range(60)]
    shares = [0.036, *[0.964 / 54] * 54, *[0.0] * 5]
    e = replace(e, parts=tuple(Part(*pair) for pair in zip(ranges, shares, strict=True)))
    assert e.summary() == "the evidence is spread over 55 parts, with at most 4 % in each"


@pytest.mark.parametrize(
    ("explained_class", "answer_without", "told"),
    [
        ("bold", "bold", "the prediction stays <b>bold</b> (50.0 %); bold has 40.0 %, and 46.0 % with it"),
        ("bold", "light", "the prediction becomes <b>light</b> (50.0 %); bold has 40.0 %, and 46.0 % with it"),
        ("light", "bold", "the prediction stays <b>bold</b> (50.0 %); light has 40.0 %, and 30.0 % with it"),
        ("light", "light", "the prediction becomes <b>light</b> (50.0 %); light has 40.0 %, and 30.0 % with it"),
    ],
)
def test_what_if_compares_with_the_answer_and_not_with_the_explained_class(
    explained_class: str, answer_without: str, told: str
) -> None:
    classes = {"bold": Prediction("bold", 0, 0.46), "light": Prediction("light", 1, 0.3)}
    e = explained(bytes(100))
    without = replace(e.without, predictions=(replace(classes[answer_without], probability=0.5),))
    e = replace(e, explained=classes[explained_class], predictions=list(classes.values()), without=without)
    text = page.html(e)
    assert told in text
    assert '<p class="answer"><b>bold</b> with 46.0 %; ' in text
    assert ("evidence below is for <b>light</b>, which has 30.0 %" in text) == (explained_class == "light")


def test_a_large_file_shows_its_beginning_and_the_most_telling_bytes() -> None:
    gradients = RNG.normal(size=300_000).astype(np.float32) * 0.01
    gradients[200_000:200_016] = 5
    text = checked(explained(bytes(300_000), gradients))
    assert len(text) < 200_000
    assert "<u>00000000</u>" in text
    assert "<u>00030d40</u>" in text
    shown = text.count("<u>0")
    hidden = sum(int(n.replace(",", "")) for n in re.findall(r"… ([\d,]+) bytes …", text))
    assert shown * page.ROW + hidden == 300_000


def file_of(format: str, pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("format", ["TIFF", "BMP", "PPM"])
def test_evidence_is_shown_over_pixels_if_bytes_are_pixels(format: str, pixels: np.ndarray) -> None:
    """Rows of a BMP are stored from bottom to top and padded, and its colours are blue, green, red."""
    content = np.frombuffer(file_of(format, pixels), np.uint8)
    picture = overlay.picture_of(structure(content).format, content, content.astype(np.float32))
    assert picture
    assert picture.evidence is not None
    want = pixels.astype(np.float32)
    np.testing.assert_array_equal(picture.evidence, want.sum(2) if want.ndim == 3 else want)
    assert (picture.height, picture.width) == pixels.shape[:2]


@pytest.mark.parametrize(("format", "options"), [("TIFF", {"compression": "tiff_lzw"}), ("PNG", {}), ("JPEG", {})])
def test_compressed_pictures_are_shown_without_evidence(format: str, options: dict) -> None:
    content = np.frombuffer(file_of(format, COLOUR, **options), np.uint8)
    picture = overlay.picture_of(format, content, np.ones(len(content), np.float32))
    assert picture
    assert picture.evidence is None
    assert picture.uri.startswith("data:image/jpeg" if format == "JPEG" else "data:image/png")


def test_evidence_is_shown_over_samples_if_bytes_are_samples() -> None:
    samples = np.arange(0, 250, dtype=np.uint8)
    content = np.frombuffer(wav_file(samples, b"hello"), np.uint8)
    gradients = np.zeros(len(content), np.float32)
    gradients[-250:-125] = 1
    wave = overlay.waveform_of("WAV", content, gradients, structure(content).ranges)
    assert wave
    assert wave.evidence.sum() == 125
    assert not wave.evidence[len(wave.evidence) // 2 + 1 :].any()
    assert wave.lowest[0] == -1
    assert (wave.highest >= wave.lowest).all()
    checked(explained(content.tobytes(), gradients))


def test_the_dict_of_an_explanation_is_small() -> None:
    e = explained(bytes(50_000))
    found = e.as_dict()
    assert found["bytes"] == 50_000
    assert len(str(found)) < 10_000
    assert found["summary"] == e.summary() == "100 % of the evidence lies in bytes"
