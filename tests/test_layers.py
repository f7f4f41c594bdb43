"""Imports go downwards only, data and model do not know each other, one file imports deepspeed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# From the bottom up. `a.b` is the module b of the package a; `a` means its other modules. A module may import modules
# of lower rows, and of its own folder in the same row.
LAYERS = [
    ["console", "process", "files", "git_state", "locations"],
    ["errors", "json_lines", "run_time", "object_stores"],
    ["typed_yaml", "batch", "ranks", "out_of_distribution"],
    ["model", "rendezvous"],
    ["config", "dist"],
    ["data.storage", "data.media", "muon"],
    ["data.packing", "data.streaming"],
    ["loss", "optim", "micro_batches"],
    ["engine"],
    ["checkpoint", "supervision.signals", "supervision.run_end", "supervision.goodput"],
    ["confusion", "curves", "baselines"],
    ["supervision"],
    ["supervision.supervisor"],
    ["evaluate", "init_from", "model_card", "run_dir"],
    ["dryrun", "export", "plan_run", "compare", "rehearsal", "encode", "fetch", "import_corenet"],
    ["inputs", "answers", "explain.ranges"],
    ["explain.formats"],
    ["explain"],
    ["predict"],
    ["serve"],
    ["train"],
    ["launch"],
    ["fitting", "gpu_check"],
    ["commands"],
    ["cli"],
    ["start", "__main__"],
]
MODULES = sorted((REPOSITORY / "bfsys").rglob("*.py"))


def layer_of(module: str) -> tuple[int, str]:
    """The row of a module such as `bfsys.data.media.sounds`, and its entry there."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next((i, name) for name in names for i, row in enumerate(LAYERS) if name in row)


def imports_of(path: Path) -> set[str]:
    """All imports of a module, also those within functions. The block of a file that is run as a program is left out,
    because it only calls the command."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not _is_main_block(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            is_package = (REPOSITORY / node.module.replace(".", "/")).is_dir()  # its names are modules
            names = {a.name for a in node.names} - {"__version__"}
            found |= {f"{node.module}.{name}" for name in names} if is_package else {node.module}
    return found


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    if path.name == "__init__.py":  # the one of bfsys imports names lazily: see test_predict.py
        assert not imports_of(path) or path.parent.name == "bfsys"
        return
    level, name = layer_of(module)
    for imported in imports_of(path):
        if imported.startswith("bfsys"):
            other_level, _ = layer_of(imported)
            same_package = level == other_level and imported.rpartition(".")[0] == module.rpartition(".")[0] != "bfsys"
            assert other_level < level or same_package, f"{module} imports {imported}"
        if imported.split(".")[0] == "deepspeed":
            assert name == "engine", f"{module} imports deepspeed"
    if name.startswith("data."):
        assert not any(i.startswith("bfsys.model") for i in imports_of(path)), "data and model know each other"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "bfsys").iterdir()), ids=lambda p: p.name)
def test_no_module_bears_a_standard_name(path: Path) -> None:
    """`deepspeed bfsys/train.py` puts bfsys/ first on sys.path, where it would hide standard modules."""
    assert path.stem in ("__init__", "__pycache__") or path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_an_outage_is_not_a_missing_file(path: Path) -> None:
    """These methods of `Path` return False on any error since Python 3.14. bfsys/files.py has functions that do not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("exists", "is_file", "is_dir"):
            assert ast.unparse(node.value) in ("os.path", "entry"), f"{path}:{node.lineno}: {ast.unparse(node)}"
