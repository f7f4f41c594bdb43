"""The dataset.json of a packed dataset. Reading checks its types, since people and other programs write it too."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from bfsys.data.storage.classes import notes_on_classes
from bfsys.data.storage.remote import SMALL_FILE_BYTES, too_long
from bfsys.errors import UserError, code_of, counted, one_line, some
from bfsys.files import open_regular, read_up_to

FORMAT = 2
DESCRIPTION = "dataset.json"
LISTED = 20  # problems of a damaged dataset.json that an error lists
PACK_AGAIN = (
    f"a damaged {DESCRIPTION} cannot be trusted; pack the dataset again, or copy it again from an intact source"
)
Count = Annotated[int, Field(ge=0, lt=2**63)]


class IndexFile(TypedDict):
    name: str
    sha256: str
    size_bytes: Count


class Index(TypedDict):
    samples: IndexFile
    keys: IndexFile


class ShardFile(TypedDict):
    file: str
    samples: Count
    bytes: Count
    sha256: str
    index_xxh3: str


class Part(TypedDict):
    """A split."""

    samples: Count
    bytes: Count
    length_quantiles: dict[str, Count]
    class_counts: dict[str, Count]
    index: Index
    shards: list[ShardFile]


class Description(TypedDict):
    format: int
    name: str
    encoding: str
    made_by: NotRequired[dict]
    classes: list[str]
    splits: dict[str, Part]
    notes: NotRequired[list[str]]


_ADAPTER = TypeAdapter(Description)


def version_of(path: Path) -> tuple[int, ...]:
    """What changes if the dataset.json in the folder at `path` is replaced; nothing if it is not there."""
    # A network file system checks an opened file with its server, and may answer os.stat from a cache.
    with suppress(OSError), open_regular(path / DESCRIPTION) as file:
        status = os.fstat(file.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return ()


def read_description(path: Path) -> dict:
    """The content of dataset.json in the folder at `path`."""
    file = path / DESCRIPTION
    try:
        with open_regular(file) as opened:
            content = bytes(read_up_to(opened, SMALL_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(path):
            raise UserError(
                f"{path}: there is no such folder{seen_from(path)}; give the folder of a packed dataset, or run bfsys "
                "pack to make one"
            ) from None
        quoted = shlex.quote(str(path))
        raise UserError(
            f"{path}: holds no {DESCRIPTION}, so it is not a packed dataset. If packing was not finished, run the same "
            f"command again; for files in class folders, run: bfsys pack {quoted} OUT --name NAME; "
            f"for tars made elsewhere, run: bfsys inspect {quoted} --rebuild"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})", exit_code=code_of(error)) from error
    if len(content) > SMALL_FILE_BYTES:
        raise too_long(file)
    return parse_description(content, file)


def seen_from(path: Path) -> str:
    """For messages about a missing path: a note with the folder to which a relative path refers; empty for an absolute
    path."""
    return "" if path.is_absolute() else f" in the current folder, which is {Path.cwd()}"


def parse_object(content: bytes) -> dict:
    """The object in a JSON file with the key `format`. Raises ValueError."""
    try:
        description = json.loads(content)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(description, dict) or "format" not in description:
        raise ValueError("it has no 'format'")
    return description


def parse_description(content: bytes, where: str | Path) -> dict:
    """The content of a dataset.json; `where` is for messages."""
    try:
        description = parse_object(content)
    except ValueError as error:
        raise UserError(f"{where}: cannot be read as {DESCRIPTION} ({error}); pack the dataset again") from error
    number = description["format"]
    if number != FORMAT:
        raise UserError(f"{where}: has format {number!r}; this version reads format {FORMAT}: pack the dataset again")
    if problems := check_description(content):
        raise UserError(*(f"{where}: is damaged: {problem}" for problem in problems[:LISTED]), PACK_AGAIN)
    return description


def check_description(content: bytes) -> list[str]:
    """The problems in the content of a dataset.json."""
    try:
        description = _ADAPTER.validate_json(content, strict=True)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}"
            for detail in error.errors(include_url=False, include_input=False)
        ]
    classes, splits = description["classes"], description["splits"]
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    problems = [f"classes: {name!r} is given twice" for name in twice]
    if not classes:
        problems.append("classes: there are none")
    if not splits:
        problems.append("splits: there are none")
    for split, part in splits.items():
        files = [
            *(shard["file"] for shard in part["shards"]),
            part["index"]["samples"]["name"],
            part["index"]["keys"]["name"],
        ]
        problems += [
            f"splits.{split}: names {name!r}; a file in the folder of the dataset is expected"
            for name in files
            if name in ("", ".", "..") or {"/", "\0"} & set(name)
        ]
    problems += [
        f"splits.{split}.class_counts: its classes are not those of the dataset, in the same order"
        for split, part in splits.items()
        if list(part["class_counts"]) != classes  # the index holds positions in `classes`, so their order matters
    ]
    problems += [
        f"splits.{split}.length_quantiles: has no {name!r}"
        for split, part in splits.items()
        for name in ("50%", "max")
        if name not in part["length_quantiles"]
    ]
    return problems


def summarise(description: dict) -> str:
    """A readable summary of a dataset."""
    classes = description["classes"]
    lines = [
        f"{description['name']}: {counted(len(classes), 'class')} ({some(classes)}), encoding {description['encoding']}"
    ]
    for split, part in description["splits"].items():
        counts = [count for count in part["class_counts"].values() if count]
        each = f" ({min(counts):,} to {max(counts):,} each)" if counts else ""
        quantiles = ", ".join(f"{name} {value:,}" for name, value in part["length_quantiles"].items())
        lines += [
            f"  {split}: {counted(part['samples'], 'sample')} of {counted(len(counts), 'class')}{each}, "
            f"{part['bytes']:,} bytes in {counted(len(part['shards']), 'shard')}",
            f"    bytes per sample: {quantiles}",
        ]
    training = description["splits"].get("train", {}).get("class_counts")
    notes = [*notes_on_classes(training, len(classes)), *description.get("notes", [])]
    return "\n".join(map(one_line, [*lines, *(f"  note: {note}" for note in notes)]))
