"""The types of the values in a manifest.json. Its sha256 shows damage, but not that a program wrote something else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

Count = Annotated[int, Field(ge=0, lt=2**63)]


class DescribedFile(TypedDict):
    bytes: Count
    sha256: str


class Manifest(TypedDict, total=False):
    """Earlier versions lack some of these, and imported weights have others besides."""

    step: Count
    updates: Count
    classes: list[str]
    config: dict
    plan: dict
    versions: dict
    metrics: dict | None
    guard: dict | None
    input_formats: list[dict]
    reference_files: dict | None
    shapes: dict[str, list[Count]]
    files: dict[str, DescribedFile]


_ADAPTER = TypeAdapter(Manifest)


def check_types(manifest: dict) -> list[str]:
    """A problem for each value of another type."""
    try:
        _ADAPTER.validate_python(manifest, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        return [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in found]
    return []
