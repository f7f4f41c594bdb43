"""A sweep: a run for each combination of values, with its own name. Both launchers train the same runs.

Importing this module is quick, so that a wrong value is reported at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bfsys.config import Config, load_config
from bfsys.errors import collecting

_AXIS = re.compile(r"([\w.]+)=(.+)")


def sweep_overrides(config_file: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of every run: a run for each combination of the axes `KEY=A,B,…`, or a single run without axes."""
    matches = [match for text in sweep if (match := _AXIS.fullmatch(text))]
    if not matches:
        return [tuple(overrides)]
    axes = [[(match[1], value.strip()) for value in match[2].split(",")] for match in matches]
    ends = [match[1].rpartition(".")[2] for match in matches]
    shown = {m[1]: m[1] if end == "name" or ends.count(end) > 1 else end for m, end in zip(matches, ends, strict=True)}
    base = load_config(config_file, tuple(overrides)).name
    of_runs = []
    for chosen in itertools.product(*axes):
        name = "-".join([base, *(f"{shown[key]}={value.replace('/', '_')}" for key, value in chosen)])
        of_runs.append((*overrides, *(f"{key}={value}" for key, value in chosen), f"name={name}"))
    return of_runs


def _wrong_axes(sweep: Sequence[str]) -> Iterator[str]:
    keys: set[str] = set()
    for text in sweep:
        match = _AXIS.fullmatch(text)
        if not match:
            yield f"--sweep: got {text!r}; KEY=A,B,… is expected, for example train.seed=0,1"
            continue
        key, values = match.groups()
        if key in keys:
            yield f"--sweep: {key} is given twice; give all of its values at once, {key}=A,B,…"
        if key in ("name", "runs_dir"):
            yield f"--sweep: {key} does not influence the result; each run is named automatically"
        if "" in map(str.strip, values.split(",")):
            yield f"--sweep: got {text!r}, which has an empty value between commas or at an end"
        if "[" in values or "{" in values:
            yield f"--sweep: got {text!r}; lists and mappings cannot be swept, since a comma separates the values"
        keys.add(key)


def sweep_configs(
    config_file: str, overrides: Sequence[str], sweep: Sequence[str], problems: list[str]
) -> list[Config]:
    """Return the configs that can be read. The problems of the others are added to `problems`."""
    configs: list[Config] = []
    wrong = list(_wrong_axes(sweep))
    problems += wrong
    if any(_AXIS.fullmatch(text) for text in sweep) and wrong:
        return configs
    with collecting(problems):
        for of_run in sweep_overrides(config_file, overrides, sweep):
            with collecting(problems):
                configs.append(load_config(config_file, of_run))
    seen: dict[Config, str] = {}
    for config in configs:
        values = replace(config, name="")
        if values in seen:
            problems.append(f"--sweep: {seen[values]} and {config.name} have the same values; give each value once")
        elif config.name in seen.values():
            problems.append(f"--sweep: two of its runs would both be named {config.name}; give other values")
        seen.setdefault(values, config.name)
    return configs
