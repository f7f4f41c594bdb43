"""Strict conversion of YAML to frozen dataclasses. Unknown keys and wrong types are errors; all are reported at once.

Pydantic checks the values. This module reads and writes the scalars of YAML 1.2 (PyYAML reads `1e-3` as a string and
`on` as true), applies `a.b=c` overrides, and turns the problems into sentences with the nearest allowed name. Rejected
alternatives: OmegaConf and Hydra, which check types late, one at a time, and add a language of their own.

The value of an override is taken as typed, because a shell has its own quotes: `#`, `: ` and spaces are part of it.
Text in one pair of quotes is the text between them. For a field that holds text, everything else is the text too,
except `null` where the field may be empty. For other fields, a value that begins with [ or { is YAML, and every other
value is one scalar of YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from bfsys.errors import UserError, code_of, collecting, did_you_mean
from bfsys.files import decoded, open_regular

T = TypeVar("T")
LISTED = 20  # problems that an error lists
SHOWN_TEXT = 60  # characters of a value that a message shows
MOST_BYTES = 16_000_000  # size of a file
MOST_VALUES = 100_000  # number of values in a file, with aliases expanded
_adapter: Callable[[type], TypeAdapter] = functools.cache(TypeAdapter)
# File names that are not UTF-8 contain lone surrogates, which JSON parsers reject. They become _MARK and their code.
_MARK = "\U0010ffff"
_ODD = re.compile(f"[\ud800-\udfff{_MARK}]")
_MARKED = re.compile(f"{_MARK}([0-9a-f]{{6}})")
_QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1""", re.DOTALL)
# Messages by pydantic's names of type errors.
_REMEDIES = {
    "string_type": "text is expected; put it in quotes",
    "bool_type": "write true or false",
    "tuple_type": "write a list, such as [a, b]",
    "dataclass_type": "write its keys under it, or {key: value}",
}


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2. Duplicate keys are errors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # More digits than Python reads, or a tag that the value does not fit
        except (ValueError, LookupError, AttributeError, TypeError):
            kind, text = node.tag.rpartition(":")[2], str(node.value)
            shown = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}…"
            problem = f"{shown!r} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
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
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] == "null"]
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


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """Write unprintable text, such as line breaks, with escapes in double quotes; other styles fold line breaks."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def load(
    cls: type[T], path: str | Path, overrides: Sequence[str] = (), presets: Mapping[str, Mapping[str, dict]] = {}
) -> T:
    """Read `path` (UTF-8, or UTF-16 with a byte order mark) into dataclass `cls`, then apply overrides
    `section.key=value`.

    `presets` are trees of values, by a top-level key and its value: {"recipe": {"fast": {"optim": {…}}}}. A preset
    value applies if neither the file nor an override gives one.

    Raises UserError with one message per problem.
    """
    try:
        with open_regular(path) as file:  # each rank and each restart reads it again, and a pipe can be read only once
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"config {path}: has more than {MOST_BYTES:,} bytes; a config has a few thousand")
        text = decoded(content)
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}", exit_code=code_of(error)) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"config {path}: is not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    with _yaml_errors(f"config {path}"):
        tree = yaml.load(text, Loader=_Loader)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected `key: value` lines at the top, got {_kind(tree)}")
    problems: list[str] = []
    try:
        tree = _plain(tree)
        for override in overrides:
            with collecting(problems):
                _apply(cls, tree, override)
        if problems:
            raise UserError(*problems)
        tree = _plain(tree)
    except (ValueError, RecursionError) as error:
        raise UserError(f"config {path}: {error}") from None
    for key, trees in presets.items():
        if isinstance(value := tree.get(key), str):
            _fill_up(tree, trees.get(value, {}))
    return from_tree(cls, tree, f"config {path}", is_typed=True)


def from_tree(cls: type[T], tree: dict, where: str, *, is_typed: bool = False) -> T:
    """Check a tree of plain values against dataclass `cls`. Raises UserError with one message per problem.

    `is_typed`: a user wrote the values, so validators expand ~ and variables. It is their `info.context`.
    """
    try:
        # Through JSON, since pydantic's strict mode then accepts objects as dataclasses and lists as tuples.
        text = _ODD.sub(lambda found: f"{_MARK}{ord(found[0]):06x}", json.dumps(tree, ensure_ascii=False))
        config = _adapter(cls).validate_json(text, strict=True, context=is_typed)
        return _with_odd(config) if _MARK in text else config
    except ValidationError as error:
        of_fields: dict[tuple[int | str, ...], list[ErrorDetails]] = {}  # for a union, one of each member
        for detail in error.errors(include_url=False):
            of_fields.setdefault(_field_of(cls, detail), []).append(detail)
        problems = list(dict.fromkeys(f"{where}: {_sentence(cls, *found)}" for found in of_fields.items()))
        if more := len(problems[LISTED:]):
            problems[LISTED:] = [f"{where}: {more:,} more values are wrong"]
        raise UserError(*problems) from None
    except (TypeError, ValueError) as error:  # from json.dumps: a type that JSON lacks, a list that contains itself
        raise UserError(f"{where}: {error}") from None


def _plain(tree: dict) -> dict:
    """A copy of the tree in which each alias is a separate value, so that an override changes only one place.

    Raises ValueError for values that a config must not contain: types that JSON lacks, values that contain themselves,
    and aliases that expand to too many values.
    """
    count = 0

    def copy(value: Any, key: str, around: tuple[int, ...]) -> Any:
        nonlocal count
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES:,} values, counting the values of its aliases")
        if id(value) in around:
            raise ValueError(f"{key}: an alias in it contains itself")
        inside = (*around, id(value))
        if isinstance(value, dict):
            return {name: copy(inner, f"{key}.{name}" if key else str(name), inside) for name, inner in value.items()}
        if isinstance(value, list):
            return [copy(inner, f"{key}.{number}", inside) for number, inner in enumerate(value)]
        if not isinstance(value, str | int | float | None):
            kind = type(value).__name__
            raise ValueError(f"{key}: got {kind}; text, numbers, true, false, null, lists and mappings are allowed")
        return value

    return copy(tree, "", ())


def to_tree(config: Any) -> dict:
    """The plain values of a config dataclass; the inverse of `from_tree`."""
    return json.loads(json.dumps(dataclasses.asdict(config), ensure_ascii=False))


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """The values of a tree by the keys that overrides use, such as `data.sources.0.path`. A list of plain values is one
    value."""
    if isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {key: tree}
    parts = (flatten(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def dump(config: Any) -> str:
    """The resolved config, or its tree, as YAML."""
    tree = config if isinstance(config, dict) else to_tree(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _with_odd(value: Any) -> Any:
    """A checked config with the surrogates that were hidden from pydantic."""
    if isinstance(value, str):
        return _MARKED.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, tuple):
        return tuple(map(_with_odd, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _with_odd(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def _fill_up(tree: dict, preset: Mapping) -> None:
    """Add missing values from `preset` to `tree`, in place."""
    for key, value in preset.items():
        if not isinstance(value, dict):
            tree.setdefault(key, value)
        elif isinstance(under := tree.setdefault(key, {}), dict):
            _fill_up(under, value)


@contextmanager
def _yaml_errors(where: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason: str | None = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, yaml.reader.ReaderError):
            reason = f"the character {chr(error.character)!r} at position {error.position} is not allowed in YAML"
        elif isinstance(error, yaml.MarkedYAMLError):
            reason = error.problem or error.context
        raise UserError(f"{where}{line}: {reason}{remedy}") from None


def _apply(cls: type, tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: expected section.key=value, for example optim.lr=3e-4")
    parts = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        node = _child(node, part, ".".join(parts[: depth + 1]), override)
    last = parts[-1]
    value = _override_value(_type_at(cls, parts), value, f"override {override!r}")
    if isinstance(node, list):
        node[_position(node, last, key, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parts[:-1])} is {_kind(node)}, which has no {last!r}")


def _override_value(kind: Any, text: str, where: str) -> Any:
    """The value of an override for a field of type `kind`, by the rules in the module's docstring."""
    members = get_args(kind) or (kind,)
    if quoted := _QUOTED.fullmatch(text):
        return quoted[2]
    if str in members and set(members) <= {str, type(None)}:
        return None if text == "null" and type(None) in members else text
    text = text.strip()
    if text.startswith(("[", "{")):
        return _flow(text, where)
    with _yaml_errors(where):
        loader = _Loader("")
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def _flow(text: str, where: str) -> Any:
    """Parse the whole text as a list or mapping of YAML."""
    remedy = "; close every bracket, and put a text with a # in quotes, since a comment begins at a # after a blank"
    with _yaml_errors(where, remedy):
        loader = _Loader(text)
        node = loader.get_single_node()
        assert node is not None, "the text begins with a bracket"
        if node.end_mark.index < len(text):
            raise yaml.MarkedYAMLError(problem=f"{text[node.end_mark.index :]!r} follows the end")
        return loader.construct_document(node)


def _child(node: Any, part: str, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, name, override)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {name} does not exist")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(node: list, part: str, name: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"override {override!r}: {name}: the list has entries 0 to {len(node) - 1}")
    return int(part)


def _sentence(cls: type, field: tuple[int | str, ...], details: Sequence[ErrorDetails]) -> str:
    name = ".".join(map(str, field))
    detail = details[0]
    kind, got = detail["type"], _with_odd(detail["input"])
    if kind == "unexpected_keyword_argument":
        owner = _fields_at(cls, field[:-1])
        shown = name if all(map(str, field)) else repr(name)
        return f"{shown}: no such key{did_you_mean(str(field[-1]), owner)}; allowed here: {', '.join(owner)}"
    if kind in ("missing", "missing_argument"):
        return f"{name}: missing; it has no default"
    if kind == "value_error":  # raised by a validator of bfsys
        return f"{name}: {detail['ctx']['error']}"
    given = "nothing" if got is None else repr(got)
    return f"{name}: got {given}; {', or '.join(_rule(each) for each in details)}"


def _rule(detail: ErrorDetails) -> str:
    if detail["type"] != "literal_error":
        return _REMEDIES.get(detail["type"], detail["msg"].replace("Input should be", "it must be"))
    allowed = detail["ctx"]["expected"]
    hint = did_you_mean(str(_with_odd(detail["input"])), re.findall(r"'([^']*)'", allowed))
    return f"allowed: {allowed}{hint}"


def _field_of(cls: type, detail: ErrorDetails) -> tuple[int | str, ...]:
    """The location of an error, without pydantic's names of validators and of members of a union."""
    location = tuple(part for part in detail["loc"] if not str(part).startswith("function-"))
    if detail["type"] != "unexpected_keyword_argument" and _type_at(cls, location) == _type_at(cls, location[:-1]):
        return location[:-1]
    return location


def _type_at(cls: Any, location: Sequence[str | int]) -> Any:
    """The type of the field at a location such as ("data", "sources", 0), without Annotated."""
    for part in location:
        parents = (cls, *get_args(cls))
        owner = next((kind for kind in parents if dataclasses.is_dataclass(kind)), None)
        if owner and part in (hints := get_type_hints(owner)):
            cls = hints[part]
        elif get_origin(cls) is tuple and str(part).isdecimal():
            cls = get_args(cls)[0]
        # Otherwise the part names a member of a union, and the type does not change.
    return cls


def _fields_at(cls: Any, location: Sequence[str | int]) -> list[str]:
    """Field names of the dataclass at a location."""
    kind = _type_at(cls, location)
    owner = next((kind for kind in (kind, *get_args(kind)) if dataclasses.is_dataclass(kind)), None)
    return [field.name for field in dataclasses.fields(owner)] if owner else []


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "a mapping", str: "a string", type(None): "an empty value", int: "a whole number",
             float: "a number", bool: "true or false"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)
