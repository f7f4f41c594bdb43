"""The reference pages of the documentation, in Markdown, generated from the code that they describe.

Config keys come from the dataclasses of bfsys/config.py, commands from the parsers of bfsys/commands, and the Python
interface from the docstrings of the public names. Nothing here imports PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo

import bfsys
from bfsys import cli, config

REPOSITORY = Path(__file__).resolve().parents[2]
# Methods and properties of public classes that only other modules of bfsys use.
INTERNAL = {"Model": ("reader", "with_messages", "answers", "probabilities_of")}
# Descriptions of special annotations.
NAMED_TYPES = {
    config.Location: "path or URL",
    config.Folder: "path of a folder",
    config.Transform: "name of a transform",
    config.Share: "number from 0 to below 1",
    config.Positive: "number above 0",
    config.NotNegative: "number of at least 0",
    config.Temperature: "number of at least 0.1",
}


def config_reference() -> str:
    """Every key of a config, with its type, default and explanation."""
    sections = [("", config.Config), ("data", config.Data), ("data.sources[]", config.Source)]
    sections += [("data.sources[].augment", config.Augment), ("data.sources[].jitter", config.Jitter)]
    sections += [("model", config.Model), ("optim", config.Optim), ("train", config.Train)]
    lines = ["# Config keys", "", *_config_introduction()]
    for prefix, section in sections:
        lines += ["", f"## {f'`{prefix}`' if prefix else 'Top level'}", "", _escaped(inspect.getdoc(section) or "")]
        for key in _keys(section):
            lines += ["", f"### `{f'{prefix}.' if prefix else ''}{key.name}`", "", f"*{key.type}* · {key.default}"]
            lines += ["", _escaped(key.text)] if key.text else []
    return "\n".join(lines) + "\n"


def _config_introduction() -> list[str]:
    rows = [
        f"| `{section}.{key}` | `{_yaml(getattr(getattr(config, section.title())(), key))}` | `{_yaml(value)}` |"
        for section, values in config.RECIPES["recommended"].items()
        for key, value in values.items()
    ]
    return [
        "A config is a YAML file. Every key can also be given on the command line, as `section.key=value`:",
        "",
        "```bash",
        "bfsys train configs/own_files.yaml optim.lr=3e-4 data.sources.0.path=data/shards/other --dry-run",
        "```",
        "",
        "An unknown key or a value of a wrong type is an error that names the nearest key. `--dry-run` shows the "
        "resolved config. In a path, `~` and `$VARIABLE` are expanded. These defaults depend on [`recipe`](#recipe):",
        "",
        "| key | `recipe: published` | `recipe: recommended` |",
        "|---|---|---|",
        *rows,
    ]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section of the config."""

    name: str
    type: str
    default: str
    text: str


def _keys(section: type) -> Iterator[Key]:
    hints, texts = get_type_hints(section, include_extras=True), attribute_docstrings(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            continue  # it has its own heading
        is_required = field.default is dataclasses.MISSING
        default = "required" if is_required else f"default `{_yaml(field.default)}`"
        yield Key(field.name, describe_type(hints[field.name]), default, texts.get(field.name, ""))


def attribute_docstrings(section: type) -> dict[str, str]:
    """Return the string that follows each annotated attribute of a class, as one paragraph."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(node, ast.ClassDef)
    return dict(_attributes(node))


def _attributes(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each annotated attribute with a string after it; in a function, of attributes of `self`."""
    for statement, after in zip(node.body, node.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=target), ast.Expr(value=ast.Constant(value=str(text))):
                yield ast.unparse(target).removeprefix("self."), " ".join(text.split())


def describe_type(hint: Any) -> str:
    """Describe the values that a key takes: `whole number of at least 1`."""
    for known, text in NAMED_TYPES.items():
        if hint == known:
            return text
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if arg is type(None) else describe_type(arg) for arg in args)
    if origin is tuple:
        return f"list: {describe_type(args[0])}"
    if origin is Annotated:
        return _describe_number(*args)
    if dataclasses.is_dataclass(hint):
        return "section"
    return {bool: "`true` or `false`", str: "text", int: "whole number", float: "number"}[hint]


def _describe_number(kind: type, *limits: Any) -> str:
    bounds = {type(m).__name__: m for limit in limits if isinstance(limit, FieldInfo) for m in limit.metadata}
    text = describe_type(kind)
    if "MultipleOf" in bounds:
        text += f", a multiple of {bounds['MultipleOf'].multiple_of}"
    if "Ge" in bounds and "Le" in bounds and bounds["Le"].le <= 100:
        return f"{text} from {bounds['Ge'].ge} to {bounds['Le'].le}"
    return f"{text} of at least {bounds['Ge'].ge}" if "Ge" in bounds else text


def _yaml(value: object) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return '""' if value == "" else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def command_reference() -> str:
    """Every command, with its arguments and options."""
    lines = ["# Commands", "", "`bfsys COMMAND --help` prints the same. Exit codes are those of"]
    lines += ["[recovery](../recovery.md#exit-codes); bad input ends a command with code 2.", ""]
    lines += ["| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#bfsys-{name}) | {_cell(text)} |" for name, text in cli.COMMANDS.items()]
    for name in cli.COMMANDS:
        lines += _command(f"bfsys {name}", cli.parser_of(cli.module_of(name), f"bfsys {name}"))
        if name == "slurm":
            title = "bfsys slurm status, logs, stop"
            lines += _command(title, cli.parser_of(cli.module_of("slurm_jobs"), "bfsys slurm"))
    return "\n".join(lines) + "\n"


def _command(title: str, parser: argparse.ArgumentParser) -> list[str]:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    lines = ["", f"## {title}", "", " ".join((parser.description or "").split()), "", "```text", usage, "```", ""]
    rows = [row for action in parser._actions for row in _rows_of(parser, action)]
    lines += ["| argument | |", "|---|---|", *rows]
    if parser.epilog:
        lines += ["", "```text", parser.epilog, "```"]
    return lines


def _rows_of(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
        return
    formatter = parser._get_formatter()
    metavar = formatter._get_default_metavar_for_optional(action)
    value = "" if action.nargs == 0 else formatter._format_args(action, metavar)
    names = [f"{option} {value}".strip() for option in action.option_strings] or [str(action.metavar or action.dest)]
    text = formatter._expand_help(action) if action.help else "required" if action.required else ""
    yield f"| {'<br>'.join(f'`{name}`' for name in names)} | {_cell(text)} |"


def python_reference() -> str:
    """The public names of the package, from their signatures and docstrings."""
    introduction = docstring_markdown(bfsys.__doc__ or "")
    lines = ["# Python", "", introduction]
    for name in ("fit", "load", "files_in", "Model", "Prediction", "Explanation", "UserError"):
        path = REPOSITORY / (bfsys._MODULES[name].replace(".", "/") + ".py")
        node = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) == name)
        lines += ["", f"## `bfsys.{name}`", ""]
        lines += _class(node) if isinstance(node, ast.ClassDef) else _function(node, f"bfsys.{name}")
    return "\n".join(lines) + "\n"


def _class(node: ast.ClassDef) -> list[str]:
    lines = [docstring_markdown(ast.get_docstring(node) or "")]
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef) and not _is_overload(n)]
    attributes = list(_attributes(node))
    attributes += [pair for f in functions if f.name == "__init__" for pair in _attributes(f)]
    public = [f for f in functions if not f.name.startswith("_") and f.name not in INTERNAL.get(node.name, ())]
    attributes += [(f.name, " ".join((ast.get_docstring(f) or "").split())) for f in public if _is_property(f)]
    if attributes:
        lines += ["", "| attribute | |", "|---|---|", *(f"| `{name}` | {_cell(text)} |" for name, text in attributes)]
    for function in public:
        if not _is_property(function):
            lines += ["", f"### `{node.name}.{function.name}`", "", *_function(function, function.name)]
    return lines


def _decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def _is_overload(node: ast.FunctionDef) -> bool:
    return "overload" in _decorators(node)


def _is_property(node: ast.FunctionDef) -> bool:
    return "property" in _decorators(node)


def _function(node: Any, name: str) -> list[str]:
    """Format the signature, with one argument per line if it is long, and the docstring."""
    assert isinstance(node, ast.FunctionDef)
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    signature = f"{name}({', '.join(arguments)}){result}"
    if len(signature) > 88:
        signature = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){result}"])
    return ["```python", signature, "```", "", docstring_markdown(ast.get_docstring(node) or "")]


def _arguments(args: ast.arguments) -> list[str]:
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(positional, defaults, strict=True)]
    texts = [_argument(argument, default) for argument, default in pairs]
    if args.kwonlyargs:
        pairs = [*zip(args.kwonlyargs, args.kw_defaults, strict=True)]
        texts += ["*", *(_argument(argument, default) for argument, default in pairs)]
    return texts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    return text if default is None else f"{text} = {ast.unparse(default)}".replace("'", '"')


def docstring_markdown(docstring: str) -> str:
    """Convert a docstring to Markdown: examples and indented lines become code, columns of names and texts a list."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if blocks and block.startswith("    ") and blocks[-1].startswith("    "):  # a blank line within code
            blocks[-1] += f"\n\n{block}"
        else:
            blocks.append(block)
    return "\n\n".join(map(_block, blocks))


def _block(block: str) -> str:
    lines = block.splitlines()
    if lines[0].startswith(">>>"):
        return f"```pycon\n{block}\n```"
    if all(line.startswith("    ") or not line for line in lines):
        return f"```python\n{textwrap.dedent(block)}\n```"
    if re.match(r"\w+ {2,}\S", lines[0]):
        joined = re.sub(r"\n {2,}", " ", block)
        pairs = [re.split(r" {2,}", line, maxsplit=1) for line in joined.splitlines()]
        return "\n".join(f"- `{name}`: {_escaped(text)}" for name, text in pairs)
    return _escaped(block)


def _escaped(text: str) -> str:
    """Escape everything in a text that has a meaning in Markdown, except `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<*\[\]])", r"\\\1", p) for p in parts)


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("|", "\\|")
