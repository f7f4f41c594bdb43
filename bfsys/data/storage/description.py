"""The content of a dataset.json: its types are checked on reading, since people and other programs write it too."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from bfsys.data.storage.classes import notes_on_classes, some
from bfsys.errors import counted, one_line

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
        f"splits.{split}.class_counts: its classes are not those of the dataset"
        for split, part in splits.items()
        if part["class_counts"].keys() != set(classes)
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
