"""The generated references are complete, and the site has every page."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator

import pytest

import bfsys
from bfsys import cli, config
from tests.conftest import REPOSITORY
from tools.docs import reference

NAV = re.compile(r": ([\w/]+\.md)$", re.MULTILINE)


def keys(section: type, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(section):
        nested = {"data": config.Data, "model": config.Model, "optim": config.Optim, "train": config.Train}
        if section is config.Config and field.name in nested:
            yield from keys(nested[field.name], f"{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_key_has_an_entry_with_type_and_default() -> None:
    page = reference.config_reference()
    for key in [*keys(config.Config, ""), *keys(config.Source, "data.sources[]."),
                *keys(config.Augment, "data.sources[].augment.")]:  # fmt: skip
        assert re.search(rf"^### `{re.escape(key)}`\n\n\*.+\* · (required|default `.*`)$", page, re.MULTILINE), key
    assert "Samples of one step, over all ranks." in page


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        (config.Train, "zero_stage", "whole number from 0 to 3"),
        (config.Model, "kernel", "whole number, a multiple of 2 of at least 2"),
        (config.Model, "size", "`tiny`, `small`, `base`, `huge`, `custom`"),
        (config.Model, "merge_after", "list: whole number of at least 0 or `null`"),
        (config.Optim, "beta1", "number from 0 to below 1"),
        (config.Source, "eval_path", "path or URL or `null`"),
        (config.Data, "mixture", "`weights`, `proportional`, `sqrt` or number of at least 0.1"),
        (config.Train, "precision", "`fp32`, `bf16`"),
    ],
)
def test_types_are_described_for_people(section: type, key: str, expected: str) -> None:
    assert next(k.type for k in reference._keys(section) if k.name == key) == expected


def test_every_command_and_option_has_a_row() -> None:
    page = reference.command_reference()
    for name in cli.COMMANDS:
        part = page.partition(f"\n## bfsys {name}\n")[2].partition("\n## ")[0]
        actions = cli.parser_of(cli.module_of(name), "")._actions
        options = [o for a in actions if a.help != argparse.SUPPRESS for o in a.option_strings]
        for option in set(options) - {"-h", "--help"}:
            assert re.search(rf"^\| .*`{option}[ `]", part, re.MULTILINE), (name, option)
    assert "## bfsys slurm status, logs, stop" in page


def test_every_public_name_and_method_is_described() -> None:
    page = reference.python_reference()
    for name in bfsys.__all__:
        assert f"\n## `bfsys.{name}`\n" in page
    public = [name for name, value in vars(bfsys.Model).items() if callable(value) and not name.startswith("_")]
    internal = reference.INTERNAL["Model"]
    assert all(hasattr(bfsys.Model, name) for name in internal)
    for name in public:
        assert (f"\n### `Model.{name}`\n" in page) == (name not in internal), name
    assert "| `classes` | Names of the classes, by index. |" in page


def test_a_docstring_becomes_markdown() -> None:
    text = 'What it does.\n\nname   of the <run>\nother  a "x",\n       or nothing\n\n>>> f(1)\n2'
    text += "\n\n    a = 1\n\n    b = 2"
    assert reference.docstring_markdown(text).split("\n\n") == [
        "What it does.",
        '- `name`: of the \\<run>\n- `other`: a "x", or nothing',
        "```pycon\n>>> f(1)\n2\n```",
        "```python\na = 1",
        "b = 2\n```",
    ]


def test_every_page_is_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    generated = {"index.md", "contributing.md", "changelog.md", "security.md"}
    generated |= {f"reference/{name}.md" for name in ("config", "commands", "python")}
    generated |= {f"notebooks/{path.stem}.md" for path in (REPOSITORY / "docs" / "notebooks").glob("*.ipynb")}
    assert set(NAV.findall(text)) == pages | generated
