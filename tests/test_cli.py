"""The console command: behaviour that all of its commands share, however they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bfsys import cli
from bfsys.errors import UserError
from tests.conftest import REPOSITORY

HEAVY = ("torch", "tensorboard", "deepspeed", "numpy", "submitit", "rich", "soundfile", "PIL")
LONGER_THAN_A_SCREEN = ("pack", "slurm")  # they have twenty or more options
NO_COMMANDS = ("__init__", "arguments", "slurm_jobs")

QUICK = f"""
import sys
from bfsys import cli
from bfsys.errors import UserError

def imports_of(*arguments):
    try:
        cli.dispatch(arguments)
    except (SystemExit, UserError) as end:
        print(*arguments, "|", end, file=sys.stderr)
    return sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{HEAVY!r}, *also}})

also = {{"pydantic", "yaml"}}
for name in cli.COMMANDS:
    found = imports_of(name, "--help")
    assert not found, (name, found)
also = set()
for name in ("train", "launch", "plan"):
    found = imports_of(name, sys.argv[1])
    assert not found, (name, found)
found = imports_of("slurm", "--nodes", "2", sys.argv[1])
assert not found, found
"""


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)


def test_help_and_config_errors_come_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("data: {sources: [{path: shards}]}\noptim: {leraning_rate: 1}\n")
    done = run("-c", QUICK, tmp_path / "typo.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("leraning_rate: no such key") == 4


def test_every_module_is_a_command_with_a_summary() -> None:
    modules = {path.stem for path in (REPOSITORY / "bfsys" / "commands").glob("*.py")} - set(NO_COMMANDS)
    assert {name.replace("-", "_") for name in cli.COMMANDS} == modules
    assert {name for name in cli.TAKE_OVERRIDES if name not in cli.COMMANDS} == set()


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.COMMANDS), ["slurm", "status"]], ids=" ".join)
def test_help_fits_a_screen(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    try:
        cli.dispatch([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0  # noqa: PT017 (argparse's way to end)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: {' '.join(['bfsys', *arguments[:1]])} ")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24 or arguments[0] in LONGER_THAN_A_SCREEN
    if "positional arguments:" in lines:  # their names are those of the usage line
        usage = " ".join(lines[: lines.index("")])
        first = lines.index("positional arguments:") + 1
        names = [line.split()[0] for line in lines[first : lines.index("", first)] if line[2:3].strip()]
        assert [name for name in names if name not in usage and name != "ACTION"] == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["--print-completion", "zsh"], ["pack", "--help"], ["slurm", "status", "-h"]],
)
def test_help_that_cannot_be_written_is_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bfsys", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("command", "prog"),
    [
        (["-m", "bfsys", "pack"], "bfsys pack"),
        (["tools/pack.py"], "tools/pack.py"),
        (["tools/inspect_shards.py"], "tools/inspect_shards.py"),
        (["tools/encode.py"], "tools/encode.py"),
        (["tools/fetch.py"], "tools/fetch.py"),
        (["tools/import_corenet.py"], "tools/import_corenet.py"),
        (["tools/make_key.py"], "tools/make_key.py"),
        (["tools/plan_run.py"], "tools/plan_run.py"),
        (["launchers/local.py"], "launchers/local.py"),
        (["launchers/slurm.py"], "launchers/slurm.py"),
        (["launchers/slurm.py", "status"], "launchers/slurm.py"),
        (["bfsys/train.py"], "bfsys/train.py"),
        (["-m", "bfsys.evaluate"], "python -m bfsys.evaluate"),
        (["-m", "bfsys.predict"], "python -m bfsys.predict"),
        (["-m", "bfsys.export"], "python -m bfsys.export"),
        (["-m", "bfsys.checkpoint"], "python -m bfsys.checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_is_called_as_the_user_called_it(command: list[str], prog: str) -> None:
    done = run(*command)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"usage: {prog} ")
    assert f"\n{prog}: error: the following arguments are required" in done.stderr
    assert "section.key=value" not in done.stderr.rpartition("required")[2]


def test_a_command_that_does_not_exist_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"'evalute': no such command \(did you mean 'evaluate'\?\)"):
        cli.dispatch(["evalute", "runs/x"])
    with pytest.raises(UserError, match=r"'x': no such command; `bfsys --help` lists all"):
        cli.dispatch(["x"])
    assert cli.dispatch(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bfsys 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "{}", "out", "--name", "x"],
        ["pack", "pets", "{}", "--name", "x"],
        ["encode", "pets", "{}"],
        ["export", "run", "{}"],
        ["explain", "run", "file", "--out={}"],
        ["evaluate", "run", "--report={}"],
        ["fit", "{}"],
        ["fit", "pets", "--runs={}"],
        ["make-key", "{}"],
        ["fetch", "imagenet", "{}"],
        ["import-corenet", "weights", "{}"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("s3://bucket/x", "got 's3://bucket/x'; a path on this machine is needed, not a URL"),
        ("", "got an empty path; write . for the current folder"),
    ],
)
def test_a_url_or_nothing_in_the_place_of_a_path_is_refused(
    arguments: list[str], path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.dispatch([argument.format(path) for argument in arguments])
    assert end.value.code == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_may_be_given_among_overrides(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.dispatch(["train", str(config_file), "train.steps=7", "--no-data", "--dry-run", "optim.lr=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 7" in shown
    assert "lr: 0.5" in shown


def test_a_shell_completes_commands_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "completion.sh").write_text(cli.completion("bash"))
    (tmp_path / "joint.yaml").touch()
    complete = """
        source completion.sh
        complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_bfsys; echo "${COMPREPLY[@]}"; }
        complete_words bfsys checkp
        complete_words bfsys evaluate --rob
        complete_words bfsys train joi
        complete_words bfsys slurm sta
        complete_words bfsys slurm joi
        complete_words bfsys slurm status joi
        complete_words bfsys --ver
    """
    done = subprocess.run(["bash", "-c", complete], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    files = ["joint.yaml"] * 2
    assert done.stdout.split() == ["checkpoint", "--robustness", "joint.yaml", "status", *files, "--version"], (
        done.stderr
    )
    assert "make-key" in cli.completion("zsh")
