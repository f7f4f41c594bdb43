"""YAML into frozen dataclasses, strictly: an unknown key or a wrong type is an error, all at once.

Pydantic checks the values; this module reads YAML 1.2's scalars (PyYAML takes `1e-3` for a string and `on`
for true), applies `a.b=c` overrides, and turns the findings into sentences with the nearest allowed name.
Refused: OmegaConf and Hydra, which check types late, one at a time, and add a language of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from bfsys.errors import UserError, collecting

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.(?:inf|Inf)$|\.(?:nan|NaN)$"
    ),
    list("-+.0123456789"),
)


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `path` into dataclass `cls`, then apply overrides `section.key=value` (values are YAML).

    Raises UserError with one message per problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not a text file ({error.reason} at byte {error.start})") from None
    tree = _parse(text, f"config {path}")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected `key: value` lines at the top, got a {_kind(tree)}")
    problems: list[str] = []
    for override in overrides:
        with collecting(problems):
            _apply(tree, override)
    if problems:
        raise UserError(*problems)
    return from_tree(cls, tree, f"config {path}")


def from_tree(cls: type[T], tree: dict, where: str) -> T:
    """Check a tree of plain values against dataclass `cls`; raises UserError with one message per problem."""
    try:
        # Through JSON, since pydantic's strict mode then still takes objects for dataclasses and lists for tuples.
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise UserError(*dict.fromkeys(f"{where}: {_sentence(cls, d)}" for d in details)) from None
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def to_tree(config: Any) -> dict:
    """The plain values of a config dataclass: what `from_tree` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: Any) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=100)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {error}") from None


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: expected section.key=value, for example optim.lr=3e-4")
    parts = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        node = _child(node, part, ".".join(parts[: depth + 1]), override)
    last = parts[-1]
    value = _parse(value, f"override {override!r}")
    if isinstance(node, list):
        node[_position(node, last, key, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parts[:-1])} is a {_kind(node)}, it has no {last!r}")


def _child(node: Any, part: str, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, name, override)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {name} does not exist")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(node: list, part: str, name: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override {override!r}: {name}: the list has entries 0 to {len(node) - 1}")
    return int(part)


def _sentence(cls: type, detail: dict) -> str:
    location = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    name = ".".join(location)
    kind, got = detail["type"], detail["input"]
    if kind == "unexpected_keyword_argument":
        owner = _fields_at(cls, detail["loc"][:-1])
        near = difflib.get_close_matches(location[-1], owner, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{name}: no such key; {hint}Allowed here: {', '.join(owner)}"
    if kind in ("missing", "missing_argument"):
        return f"{name}: missing; it has no default"
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"]
        near = difflib.get_close_matches(str(got), re.findall(r"'([^']*)'", allowed), 1, 0.5)
        return f"{name}: got {got!r}; allowed: {allowed}" + (f" (did you mean {near[0]!r}?)" if near else "")
    rule = detail["msg"].replace("Input should be", "it must be")
    return f"{name}: got {got!r}; {rule}"


def _fields_at(cls: Any, location: Sequence[str | int]) -> list[str]:
    """Field names of the dataclass at a location such as ("data", "sources", 0)."""
    for part in location:
        if isinstance(part, int):
            candidates = get_args(cls)
        elif dataclasses.is_dataclass(cls) and part in (hints := get_type_hints(cls)):
            candidates = (hints[part], *get_args(hints[part]))
        else:
            continue  # pydantic names the member of a union here; the type is the one already found
        wanted = candidates if isinstance(part, int) else candidates[:1]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), wanted[0] if wanted else cls)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _kind(value: Any) -> str:
    return {list: "list", dict: "mapping", str: "string", type(None): "empty value"}.get(
        type(value), type(value).__name__
    )
