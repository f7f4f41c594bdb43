"""The page in a browser: files are chosen and dropped, and the answers are read from the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import bfsys
from tests.serve.browser import Browser, find
from tests.serve.conftest import Server

pytest.importorskip("fastapi")
pytestmark = pytest.mark.skipif(find() is None, reason="needs chromium")

ROWS = "[...document.querySelectorAll('#answers li')].map(item => item.innerText)"
DROP = """
const data = new DataTransfer();
data.items.add(new File([new Uint8Array(30).fill(40)], "<b>dropped</b>"));
const options = {dataTransfer: data, bubbles: true, cancelable: true};
document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
"""


@pytest.fixture
def browser(server: Server, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as started:
        started.open(server.url)
        started.wait("document.getElementById('limits').textContent === 'up to 500 bytes each'")
        yield started


def test_files_are_classified(server: Server, browser: Browser, finished_run: Path, tmp_path: Path) -> None:
    good, empty, large = (tmp_path / name for name in ("good", "empty", "large"))
    good.write_bytes(bytes([41] * 50))
    empty.write_bytes(b"")
    large.write_bytes(bytes(11_000_000))
    browser.choose("#files", good, empty, large)
    browser.wait("document.body.dataset.done === '1'")
    first, second, third = ([*filter(None, text.splitlines())] for text in browser.value(ROWS))
    best = bfsys.load(finished_run).predict(good)[0]
    assert first[0] == "good"
    row = browser.value("document.querySelector('#answers tr').textContent")
    assert row == f"{best.class_name}{100 * best.probability:.1f} %"
    assert second == ["empty", "empty; there is nothing to classify"]
    assert third == ["large", "11 MB; up to 500 bytes are allowed"]
    assert browser.value("document.getElementById('status').textContent") == "1 of 3 files are classified."

    browser.value(DROP)
    browser.wait("document.body.dataset.done === '2'")
    assert browser.value(ROWS)[0].startswith("<b>dropped</b>\n")  # a name is shown as text, not as HTML
    assert browser.value("document.querySelector('#answers b')") is None

    browser.value("document.querySelector('button.explain').click()")
    browser.wait("document.querySelector('#answers iframe') !== null")
    assert browser.value("document.querySelector('#answers iframe').getAttribute('sandbox')") == ""
    assert "&lt;b&gt;dropped" in browser.value("document.querySelector('#answers iframe').srcdoc")

    assert not [url for url in browser.requested if not url.startswith((server.url, "data:", "about:"))]
