"""The documentation names files that exist, and links that lead somewhere. Its tables name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / ".github").rglob("*.md")]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
# A path of the repository, with its folder. `data/shards` and `runs/NAME` belong to the user.
NAMED = re.compile(
    r"(?<![\w./-])((?:bfsys|launchers|tools|configs|tests|docs)/[\w./*-]+|(?:model|serve|supervision)/\w+\.py)"
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """The links of a page to files or headings that do not exist."""
    found = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            found.append(link)
    return found


def missing_files(page: Path) -> list[str]:
    """The files that a page names as part of the repository, but that do not exist."""
    found = []
    for code in CODE.findall(page.read_text()):
        for name in NAMED.findall(code):
            name = name.rstrip("./")
            if not any(list(folder.glob(name)) for folder in (REPOSITORY, REPOSITORY / "bfsys")):
                found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_files_exist(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_files(page) == []


def test_a_broken_link_and_a_missing_file_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n[a](#one-heading) [b](#other) [c](gone.md) [d](https://example.com)\n`tools/gone.py`\n"
    )
    assert broken_links(page) == ["#other", "gone.md"]
    assert missing_files(page) == ["tools/gone.py"]


LAYOUT_ROW = re.compile(r"^\| (`[^|]+`) \| (.+) \|$", re.MULTILINE)
DUNDER = re.compile(r"__\w+__")


def modules_without_a_row(design: str) -> list[str]:
    """The modules of bfsys that the table "Layout" does not name: by their path, or beside the path of their folder."""
    table = design[design.index("## Layout") :]
    beside = {place: row for places, row in LAYOUT_ROW.findall(table) for place in re.findall(r"`([^`]+)`", places)}
    missing = []
    for path in sorted((REPOSITORY / "bfsys").rglob("*.py")):
        name = path.relative_to(REPOSITORY)
        folder = next((f"{parent}/" for parent in name.parents if f"{parent}/" in beside), "")
        subfolder = f"{path.parent.name}/"  # is named as a whole
        is_named = f"`{path.stem}`" in beside.get(folder, "") or f"`{subfolder}`" in beside.get(folder, "")
        if not (str(name) in beside or is_named or folder == "bfsys/commands/" or DUNDER.fullmatch(path.stem)):
            missing.append(str(name))
    return missing


def test_the_layout_names_every_module() -> None:
    design = (REPOSITORY / "docs" / "design.md").read_text()
    assert modules_without_a_row(design) == []
    assert modules_without_a_row(design.replace("`ring`", "").replace("`bfsys/muon.py`", "")) == [
        "bfsys/data/streaming/ring.py", "bfsys/muon.py"
    ]  # fmt: skip


def test_the_reference_of_metrics_names_every_field(finished_run: Path) -> None:
    named = " ".join(re.findall(r"`[^`\n]+`", (REPOSITORY / "docs" / "metrics.md").read_text()))
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "eval"}
    for line in lines:
        assert {field for field in line if not re.search(rf"\b{field}\b", named)} == set()
