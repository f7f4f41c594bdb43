"""`bfsys explain` and `Model.explain` on a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bfsys
from bfsys.cli import call
from bfsys.data.streaming.byte_transforms import parse_transforms
from bfsys.errors import UserError
from bfsys.explain.page import html
from tests.commands.packing_helpers import make_files
from tests.conftest import closed_output
from tests.explain.tiny import png_file

Explain = Callable[..., str]


@pytest.fixture
def explain(finished_run: Path, capsys: pytest.CaptureFixture) -> Explain:
    def command(*arguments: object) -> str:
        call("explain", [str(finished_run), *map(str, arguments)])
        return capsys.readouterr().out

    return command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return make_files(tmp_path / "in", {"one.bin": bytes([41] * 40), "sub/one.bin": bytes([200, 3] * 50)})


def test_each_file_gets_a_page_of_its_own(explain: Explain, files: Path, tmp_path: Path) -> None:
    out = explain(files, "--out", tmp_path / "pages").splitlines()
    assert [line.strip() for line in out[1::2]] == [
        str(tmp_path / "pages" / n) for n in ("one.bin.html", "one.bin-2.html")
    ]
    assert re.match(rf"{files}/one\.bin: [ab]0 [\d.]+ %; ", out[0])
    assert "% of the evidence lies in " in out[0]
    first = (tmp_path / "pages" / "one.bin.html").read_text()
    explain(files, "--out", tmp_path / "pages")  # existing pages of the command are overwritten
    assert (tmp_path / "pages" / "one.bin.html").read_text() == first


def test_files_of_another_dataset_are_the_references(
    explain: Explain, files: Path, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The datasets of the run may be on another machine."""
    (dataset, _) = (source.path for source in bfsys.load(finished_run).config.data.sources)
    monkeypatch.setattr("bfsys.explain.references.READ", 5)
    arguments = (files / "one.bin", "--json", "--out", tmp_path / "pages")
    (found,) = json.loads(explain(*arguments, "--data", dataset))
    (otherwise,) = json.loads(explain(*arguments))
    assert found["windows"] != otherwise["windows"]
    with pytest.raises(UserError, match="nowhere: "):
        explain(*arguments, "--data", tmp_path / "nowhere")
    report = json.loads(explain("--split", "val", "--data", dataset, "--json"))
    assert report["all"]["files"] == 21


def test_a_page_is_overwritten_only_by_that_of_the_same_file(
    explain: Explain, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(*arguments: object) -> str:
        return Path(explain(*arguments, "--out", tmp_path / "pages").splitlines()[1].strip()).name

    assert page(files / "one.bin") == "one.bin.html"
    assert page(files / "sub" / "one.bin") == "one.bin-2.html"
    assert page(files / "one.bin", "--class", "b1") == "one.bin.html"
    monkeypatch.chdir(files / "sub")
    assert page("one.bin") == "one.bin-2.html"
    assert str(files) not in (tmp_path / "pages" / "one.bin-2.html").read_text()  # a page may be published


def test_pages_go_to_a_folder_here_by_default(explain: Explain, files: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    explain(files / "one.bin")
    assert [p.name for p in (tmp_path / "explain").iterdir()] == ["one.bin.html"]


def test_json_and_another_class(explain: Explain, files: Path, tmp_path: Path) -> None:
    (found,) = json.loads(explain(files / "one.bin", "--json", "--class", "b1", "--out", tmp_path / "pages"))
    assert (found["class"], found["bytes"], len(found["top"])) == ("b1", 40, 5)
    assert found["windows"][-1]["end"] == 40
    assert sum(p["share"] for p in found["parts"]) == pytest.approx(1, abs=1e-6) or found["summary"].startswith(
        "no bytes"
    )
    assert Path(found["page"]).is_file()
    assert found["reference"].startswith("4 validation")


def test_the_answer_is_printed_also_if_another_class_is_explained(
    explain: Explain, files: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "pages")
    answer = explain(files / "one.bin", *out).split("%")[0]
    other = "b1" if answer.split()[-2] != "b1" else "a0"
    assert re.match(
        rf"{re.escape(answer)}%; for {other} \([\d.]+ %\), ", explain(files / "one.bin", "--class", other, *out)
    )


def test_bad_input_is_one_line_each(explain: Explain, files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    out = ("--out", tmp_path / "pages")
    with pytest.raises(UserError) as error:
        explain(tmp_path / "empty", tmp_path / "none", tmp_path / "folder", files / "one.bin", *out)
    told = sorted(problem.partition(": ")[0].rpartition("/")[2] for problem in error.value.problems)
    assert told == ["empty", "folder", "none"]
    assert (tmp_path / "pages" / "one.bin.html").is_file()
    for arguments, expected in (
        ((files, "--class", "a9", *out), r"no class 'a9' \(did you mean 'a"),
        (("--out", tmp_path), "give files to explain, or --split"),
        ((files, "--split", "val"), "give files to explain, or --split"),
        ((files, "--limit", "3"), "--limit: is for --split"),
        (("--split", "val", "--limit", "1"), "limit: got 1"),
        (("--split", "vla"), "has a split 'vla'"),
        (("--split", "val", "--class", "a0"), "--class and --encode are for files"),
        ((files, "--seed", "-1"), "--seed: got -1"),
        ((files, "--out", files / "one.bin"), "cannot be made"),
        ((files, "--encode", *out), "no format is known"),
    ):
        with pytest.raises(UserError, match=expected):
            explain(*arguments)
    with pytest.raises(UserError, match="no such directory"):
        call("explain", [str(tmp_path / "missing"), str(files)])


def test_a_file_that_is_not_a_page_is_not_overwritten(explain: Explain, files: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "one.bin.html"
    foreign.write_text("my own page")
    with pytest.raises(UserError, match=r"one\.bin\.html: is not a page of `bfsys explain`"):
        explain(files / "one.bin", "--out", tmp_path)
    assert foreign.read_text() == "my own page"
    (tmp_path / "shortcuts.json").write_text("{}")
    with pytest.raises(UserError, match="choose another --out"):
        explain("--split", "val", "--out", tmp_path)


def test_a_split_is_reported_on(explain: Explain, tmp_path: Path) -> None:
    out = explain("--split", "val", "--limit", 20, "--out", tmp_path / "report")
    assert out.startswith("val, 20 files, in percent. top-1: accuracy")
    report = json.loads((tmp_path / "report" / "shortcuts.json").read_text())
    assert report["all"]["files"] == 20
    assert set(report["sources"]) == {"a", "b"}
    assert (tmp_path / "report" / "shortcuts.html").read_text().startswith("<!doctype html>")
    assert json.loads(explain("--split", "val", "--limit", 20, "--json"))["all"] == report["all"]


def test_all_pages_are_written_if_the_reader_of_the_output_has_ended(
    finished_run: Path, files: Path, tmp_path: Path
) -> None:
    with closed_output():
        call("explain", [str(finished_run), str(files), "--out", str(tmp_path / "pages")])
        call("explain", [str(finished_run), "--split", "val", "--limit", "20", "--out", str(tmp_path / "report")])
    assert len(list((tmp_path / "pages").iterdir())) == 2
    assert len(list((tmp_path / "report").iterdir())) == 2


def test_from_python(finished_run: Path, files: Path) -> None:
    model = bfsys.load(finished_run)
    path = files / "one.bin"
    one = model.explain(path)
    for same in (path.read_bytes(), np.frombuffer(path.read_bytes(), np.uint8), open(path, "rb")):  # noqa: SIM115
        other = model.explain(same)
        assert (other.windows, other.predictions) == (one.windows, one.predictions)
        assert np.array_equal(other.gradients, one.gradients)
    predicted = model.predict(path, top=5)
    assert [p.class_name for p in one.predictions] == [p.class_name for p in predicted]
    assert one.explained.probability == pytest.approx(predicted[0].probability, abs=1e-6)
    assert one.gradients.dtype == np.float32
    assert model.explain(path, seed=1).windows != one.windows
    with pytest.raises(UserError, match="one input at a time"):
        model.explain([path])  # type: ignore[arg-type]


def test_without_validation_data_the_file_itself_is_shuffled(finished_run: Path) -> None:
    model = bfsys.load(finished_run)
    model.config = replace(model.config, data=replace(model.config.data, sources=()))
    found = model.explain(bytes(range(60)))
    assert found.reference == "the bytes of the file itself in another order"
    assert any("less exact" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore:.*out-of-distribution score")
@pytest.mark.parametrize(("transform", "keeps"), [("noise:3:3", True), ("head:100", True), ("reverse", False)])
def test_structure_is_shown_where_bytes_keep_their_places(finished_run: Path, transform: str, keeps: bool) -> None:
    model = bfsys.load(finished_run)
    model.config = replace(model.config, data=replace(model.config.data, byte_transforms=(transform,)))
    model._reader = replace(model._reader, transforms=parse_transforms([transform]))
    content = png_file(np.zeros((3, 3), np.uint8), "text")
    found = model.explain(content)
    names = [part.range.name for part in found.parts]
    assert ("IDAT" in names) == keeps
    assert len(found.notes) >= 1
    assert "transform" in found.notes[0]
    stored = np.frombuffer(content, np.uint8)
    want = {"noise:3:3": (stored + 3).astype(np.uint8), "head:100": stored[:100], "reverse": stored[::-1]}[transform]
    assert np.array_equal(found.data, want)
    assert found.parts[-1].range.end == len(want)
    assert found.stored.tobytes() == content
    assert "<!doctype html>" in html(found)
    if not keeps:
        with pytest.raises(UserError, match="reverse moves bytes"):
            model.shortcuts()
