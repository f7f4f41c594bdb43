"""The programs in examples/ classify files with an export as the model does, and without bfsys."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import bfsys
from bfsys.cli import call
from tests.conftest import REPOSITORY
from tests.serve.browser import Browser, find

EXAMPLES = REPOSITORY / "examples"
WITHOUT_BFSYS = "import sys; sys.modules['bfsys'] = None; sys.argv = sys.argv[1:]; import runpy; "


@pytest.fixture(scope="module")
def exported_onnx(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("exported") / "model"
    call("export", [str(finished_run), str(out), "--format", "onnx"])
    return out


@pytest.fixture(scope="module")
def some_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    files = [folder / f"{value}.bin" for value in (20, 90, 160)]
    for file in files:
        file.write_bytes(bytes([int(file.stem)] * 50))
    return files


def expected(exported: Path, files: list[Path]) -> list[tuple[str, float]]:
    """The likeliest class of each file and its percentage, from bfsys."""
    answers = bfsys.load(exported, device="cpu").predict(files, top=1)
    return [(classes[0].class_name, 100 * classes[0].probability) for classes in answers]


def run_example(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{WITHOUT_BFSYS} runpy.run_path(sys.argv[0], run_name='__main__')"]
    command += [str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=900)


@pytest.mark.filterwarnings("ignore:.*resembles none of them")
@pytest.mark.parametrize(("name", "program"), [("load_pytorch.py", "exported"), ("load_onnx.py", "exported_onnx")])
def test_an_example_classifies_as_the_model_does(
    name: str, program: str, exported: Path, some_files: list[Path], request: pytest.FixtureRequest
) -> None:
    done = run_example(name, request.getfixturevalue(program), *some_files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(some_files)
    for line, file, (class_name, percent) in zip(lines, some_files, expected(exported, some_files), strict=True):
        assert line.startswith(f"{file}: {class_name} ")
        assert float(re.findall(r"([\d.]+) %", line)[0]) == pytest.approx(percent, abs=0.11)


@pytest.mark.filterwarnings("ignore:.*resembles none of them")
@pytest.mark.parametrize(("name", "program"), [("load_pytorch.py", "exported"), ("load_onnx.py", "exported_onnx")])
def test_an_example_classifies_files_whose_names_are_not_utf8(
    name: str, program: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in most locales
    files = [tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "other"]
    for file in files:
        file.write_bytes(bytes(50))
    done = run_example(name, request.getfixturevalue(program), *files)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [f"{tmp_path}/caf\\udce9", str(files[1])]


@pytest.mark.filterwarnings("ignore:.*resembles none of them")
@pytest.mark.parametrize(("name", "program"), [("load_pytorch.py", "exported"), ("load_onnx.py", "exported_onnx")])
def test_an_example_names_files_without_an_answer_and_goes_on(
    name: str, program: str, some_files: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "empty").touch()
    done = run_example(name, request.getfixturevalue(program), tmp_path / "none", tmp_path / "empty", some_files[0])
    assert done.returncode == 1
    *_, missing, short = done.stderr.splitlines()  # PyTorch 2.11 warns before
    assert missing == f"{tmp_path}/none: No such file or directory"
    assert re.fullmatch(r".*/empty: has 0 bytes; this model needs at least \d+", short)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [str(some_files[0])]


@pytest.mark.parametrize("name", ["load_pytorch.py", "load_onnx.py"])
def test_an_example_refuses_a_model_whose_bytes_are_transformed(name: str, exported: Path, tmp_path: Path) -> None:
    about = json.loads((exported / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(about | {"byte_transforms": ["reverse"]}))
    done = run_example(name, tmp_path, "file")
    assert done.returncode == 1
    assert "this model reads bytes after reverse" in done.stderr


@pytest.mark.parametrize("name", ["load_pytorch.py", "load_onnx.py"])
@pytest.mark.parametrize("damage", ["no folder", "no program", "a list", "no JSON", "a broken program"])
def test_an_example_says_in_one_line_that_an_export_cannot_be_used(
    name: str, damage: str, exported: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    if damage != "no folder":
        about = {"a list": "[]", "no JSON": "{"}.get(damage) or (exported / "model.json").read_text()
        (tmp_path / "model.json").write_text(about)
    if damage == "a broken program":
        for file in ("model.pt2", "model.onnx"):
            (tmp_path / file).write_text("x")
    done = run_example(name, tmp_path, "file")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path}: cannot be used (")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def page(exported_onnx: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of examples/browser, served as its instructions say."""
    packages = EXAMPLES / "browser" / "node_modules"
    if not packages.exists() or find() is None:
        pytest.skip("needs chromium, and npm install in examples/browser")
    site = tmp_path / "browser"
    shutil.copytree(EXAMPLES / "browser", site, ignore=shutil.ignore_patterns("node_modules", "model"))
    (site / "node_modules").symlink_to(packages.resolve())
    (site / "model").symlink_to(exported_onnx)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def test_the_page_classifies_in_a_browser(page: str, exported: Path, some_files: list[Path], tmp_path: Path) -> None:
    origin = page.removesuffix("index.html")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait("document.getElementById('model').textContent === 'tiny: 5 classes'")
        browser.choose("#files", *some_files)
        browser.wait(f"document.querySelectorAll('#answers li').length === {len(some_files)}")
        answers = browser.value("[...document.querySelectorAll('#answers li')].map(item => item.innerText)")
        assert {address.partition(":")[0] for address in browser.requested if not address.startswith(origin)} <= {
            "about"
        }
    for answer, file, (class_name, percent) in zip(answers, some_files, expected(exported, some_files), strict=True):
        assert answer.startswith(f"{file.name}: {class_name} ")
        assert float(re.findall(r"([\d.]+) %", answer)[0]) == pytest.approx(percent, abs=0.11)


def test_the_page_goes_on_after_a_file_that_it_cannot_read(page: str, some_files: list[Path], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait("!document.getElementById('files').disabled")
        browser.choose("#files", tmp_path, some_files[0])  # a folder
        browser.wait("document.querySelectorAll('#answers li').length === 2")
        answers = browser.value("[...document.querySelectorAll('#answers li')].map(item => item.innerText)")
    assert answers[0].startswith(f"{tmp_path.name}: cannot be classified: ")
    assert answers[1].startswith(f"{some_files[0].name}: ")
    assert "%" in answers[1]


def test_the_page_answers_only_the_files_chosen_last(page: str, some_files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "chosen").write_bytes(bytes(50))
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait("!document.getElementById('files').disabled")
        # Reading the first choice ends only after the second one.
        browser.value(
            "{ const read = File.prototype.arrayBuffer; const chosen = new Promise((go) => { window.go = go; });"
            "File.prototype.arrayBuffer = async function () {"
            "if (this.name !== 'chosen') await chosen; return read.call(this); }; 0 }"
        )
        browser.choose("#files", *some_files)
        browser.choose("#files", tmp_path / "chosen")
        browser.wait("document.querySelectorAll('#answers li').length === 1")
        browser.value("new Promise((done) => { window.go(); setTimeout(done, 200); })")
        answers = browser.value("[...document.querySelectorAll('#answers li')].map(item => item.innerText)")
    assert [answer.partition(":")[0] for answer in answers] == ["chosen"]


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("node_modules", "ONNX Runtime cannot be loaded; fetch it with: npm install"),
        ("model", "there is no model/model.json; write it with: bfsys export RUN"),
        ("model.onnx", "the export has no model.onnx; write it with: bfsys export RUN"),
    ],
)
def test_the_page_says_what_is_missing(missing: str, told: str, page: str, exported: Path, tmp_path: Path) -> None:
    site = tmp_path / "browser"
    if missing == "model.onnx":
        (site / "model").unlink()
        (site / "model").symlink_to(exported)
    else:
        (site / missing).unlink()
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait("!document.getElementById('model').textContent.includes('being loaded')")
        shown = browser.value("document.getElementById('model').textContent")
    assert shown.startswith(f"The model cannot be used: {told}")
