"""Start-up checks of a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

import bfsys
from bfsys import cli
from bfsys import run_dir as run_module
from bfsys.checkpoint.rollbacks import read_rollbacks
from bfsys.config import Config, load_config
from bfsys.data.streaming.quarantine import Quarantine
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import AgreedError, Ranks
from bfsys.errors import EXIT_STORAGE, UserError
from bfsys.git_state import git_state
from bfsys.run_dir import hold_directory, noting_failed_start, prepare_run_dir, run_facts
from bfsys.supervision.run_end import how_it_ended
from tests.conftest import REPOSITORY

ALONE = Ranks()
ROLLBACK = {"from": 7, "to": 4, "updates": 4, "steps": [5, 6, 7], "bad": []}


@pytest.fixture
def config(config_file: Path) -> Config:
    return load_config(config_file, ["name=again", "train.seed=1"])


def facts_of(config: Config) -> dict:
    return run_facts(open_run_data(config, ALONE))


def test_a_new_run_inherits_nothing_of_one_whose_checkpoints_were_deleted(config: Config) -> None:
    """The skipped steps, bad samples and history in the directory belong to the earlier run."""
    run_dir = config.run_dir
    (run_dir / "tb").mkdir(parents=True)
    (run_dir / "tb" / "events").write_bytes(b"x")
    (run_dir / "rollbacks.json").write_text(json.dumps([ROLLBACK]))
    (run_dir / "quarantine.tsv").write_text("0\ttrain\ta\t3\ta-train-000000.tar\ta0/3\tis empty\n")
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    directory = prepare_run_dir(config, facts_of(config), ALONE)
    directory.hold.close()
    assert directory.is_new
    (note,) = directory.notes
    assert "this is a new run: rollbacks.json, quarantine.tsv, metrics.jsonl, tb of an earlier one are in" in note
    assert read_rollbacks(run_dir) == []
    assert not Quarantine.load(run_dir, ALONE).count_until(100)
    assert sorted(path.name for path in (run_dir / "earlier-1").iterdir()) == [
        "metrics.jsonl", "quarantine.tsv", "rollbacks.json", "tb",
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("{}\n")
    directory = prepare_run_dir(config, facts_of(config), ALONE)
    directory.hold.close()
    assert "earlier-2" in directory.notes[0]


def test_a_resumed_run_keeps_its_history(finished_run: Path, config: Config) -> None:
    shutil.copytree(finished_run, config.run_dir)
    same = load_config(config.run_dir / "config.yaml", [f"runs_dir={config.runs_dir}", "name=again"])
    directory = prepare_run_dir(same, facts_of(same), ALONE)
    directory.hold.close()
    assert (directory.is_new, directory.notes) == (False, [])
    assert (config.run_dir / "metrics.jsonl").exists()
    assert not list(config.run_dir.glob("earlier-*"))


def test_a_start_removes_what_killed_starts_left(finished_run: Path, config: Config) -> None:
    shutil.copytree(finished_run, config.run_dir)
    before = sorted(path.name for path in config.run_dir.rglob("*"))
    program = (
        "import contextlib, os, pathlib, signal, sys\nfrom bfsys.files import replacing\n"
        "with contextlib.ExitStack() as stack:\n"
        "    for path in sys.argv[1:]: stack.enter_context(replacing(pathlib.Path(path)))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    names = ("config.yaml", "metrics.jsonl", "ended.json", "rollbacks.json", "checkpoints/latest")
    paths = [str(config.run_dir / name) for name in names]
    subprocess.run([sys.executable, "-c", program, *paths], timeout=900, cwd=REPOSITORY)
    assert len([*config.run_dir.rglob("*")]) == len(before) + len(names)
    same = replace(config, train=replace(config.train, seed=0))
    with prepare_run_dir(same, facts_of(same), ALONE):
        assert {path.name for path in config.run_dir.rglob("*")} - set(before) <= {".lock", "hangs"}


def test_initial_weights_for_a_run_that_has_started_are_noted(finished_run: Path, config: Config) -> None:
    shutil.copytree(finished_run, config.run_dir)
    config = replace(config, train=replace(config.train, seed=0, steps=200))
    facts = facts_of(config)
    for origin, notes in ((None, 0), ("runs/other", 1)):
        with prepare_run_dir(replace(config, train=replace(config.train, init_from=origin)), facts, ALONE) as directory:
            assert sum("train.init_from: runs/other has no effect" in note for note in directory.notes) == notes


def test_a_finished_run_keeps_the_config_that_it_was_trained_with(finished_run: Path, config: Config) -> None:
    shutil.copytree(finished_run, config.run_dir)
    file = config.run_dir / "config.yaml"
    before = file.read_text()
    changed = load_config(file, [f"runs_dir={config.runs_dir}", "name=again", "optim.lr=0.5", "train.steps=2"])
    directory = prepare_run_dir(changed, facts_of(changed), ALONE)
    directory.hold.close()
    (note,) = directory.notes
    assert (
        "steps, and train.steps is 2: nothing is left to train, so the settings of this start that differ from" in note
    )
    assert file.read_text() == before


def test_files_of_the_previous_holder_of_a_directory_are_seen(
    finished_run: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run saves its first checkpoint while this one waits for the lock."""
    hold_directory = run_module.hold_directory

    def hold_after_another_run(run_dir: Path, **options):
        shutil.copytree(finished_run / "checkpoints", run_dir / "checkpoints")
        return hold_directory(run_dir, **options)

    monkeypatch.setattr(run_module, "hold_directory", hold_after_another_run)
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        prepare_run_dir(config, facts_of(config), ALONE)
    hold_directory(config.run_dir).close()  # a refused start does not keep the lock


@pytest.mark.parametrize(("number", "is_held"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)])
def test_an_outage_is_not_taken_for_a_file_system_without_locks(
    number: int, is_held: bool, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two starts could train in one directory."""

    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    config.run_dir.mkdir(parents=True)
    if is_held:
        run_module.hold_directory(config.run_dir).close()
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_module.hold_directory(config.run_dir)


def test_a_directory_that_another_process_keeps_is_waited_for_and_then_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0.5)
    config.run_dir.mkdir(parents=True)
    with run_module.hold_directory(config.run_dir), pytest.raises(UserError, match="another process is training in it"):
        prepare_run_dir(config, facts_of(config), ALONE)
    assert capsys.readouterr().err.count("waiting for another process to release it") == 1
    # Rank 0 waits no longer than the other ranks wait for it.
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 60)
    with run_module.hold_directory(config.run_dir), pytest.raises(UserError, match="another process is training in it"):
        prepare_run_dir(replace(config, train=replace(config.train, collective_timeout_s=1)), facts_of(config), ALONE)
    assert "for up to 0 s" in capsys.readouterr().err
    assert not (config.run_dir / "config.yaml").exists()


def test_a_start_that_fails_is_the_runs_end_unless_another_trains(config: Config, monkeypatch, capsys) -> None:
    def fail() -> None:
        with run_module.noting_failed_start(config, ALONE):
            raise AgreedError("the data are gone")

    with pytest.raises(AgreedError):
        fail()
    assert not config.run_dir.exists()
    config.run_dir.mkdir(parents=True)
    with run_module.hold_directory(config.run_dir), pytest.raises(AgreedError):
        fail()
    assert how_it_ended(config.run_dir) is None
    with pytest.raises(AgreedError):
        fail()
    end = how_it_ended(config.run_dir)
    assert (end["exit_code"], end["reason"]) == (2, "the data are gone")
    assert capsys.readouterr().err == ""
    run_module.hold_directory(config.run_dir, longest_s=0).close()  # it is not kept


def test_a_refused_start_is_not_the_end_of_a_finished_run(finished_run: Path, config: Config) -> None:
    ended = how_it_ended(finished_run)
    assert ended
    assert ended["exit_code"] == 0
    other = replace(config, name=finished_run.name, runs_dir=str(finished_run.parent))
    with pytest.raises(AgreedError), noting_failed_start(other, ALONE):
        raise AgreedError("other settings")
    assert how_it_ended(finished_run) == ended


def test_a_finished_run_that_is_fetched_has_its_config(finished_run: Path, config: Config, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "fetched" / finished_run.name)
    trained = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    theirs = load_config(finished_run / "config.yaml", [f"runs_dir={run.parent}"])
    with prepare_run_dir(theirs, facts_of(theirs), ALONE):
        pass
    assert (run / "config.yaml").read_text() == trained


def test_a_replaced_run_directory_is_detected(config: Config) -> None:
    """A backup that is restored while the run trains has a lock file of its own."""
    directory = prepare_run_dir(config, facts_of(config), ALONE)
    with directory:
        directory.check_same()
        backup = shutil.copytree(config.run_dir, config.run_dir.with_name("backup"))
        config.run_dir.rename(config.run_dir.with_name("away"))
        with pytest.raises(UserError, match="again: was moved or deleted while this run trains") as error:
            directory.check_same()
        assert error.value.exit_code == EXIT_STORAGE
        backup.rename(config.run_dir)
        with pytest.raises(UserError, match="again: was replaced by another one while this run trains"):
            directory.check_same()


def test_a_start_elsewhere_on_a_file_system_without_locks_is_detected(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "try_lock", lambda file: True)
    facts = facts_of(config)
    with prepare_run_dir(config, facts, ALONE) as directory:
        monkeypatch.setattr(run_module, "_this_process", lambda: "process 1 on another")
        hold_directory(config.run_dir).close()  # by a start that is refused
        monkeypatch.undo()
        directory.check_same()
        monkeypatch.setattr(run_module, "try_lock", lambda file: True)
        monkeypatch.setattr(run_module, "_this_process", lambda: "process 1 on another")
        with prepare_run_dir(config, facts, ALONE) as later:
            later.check_same()
            monkeypatch.undo()
            with pytest.raises(UserError, match="again: process 1 on another has begun to train in it, too"):
                directory.check_same()
        (config.run_dir / ".lock").unlink()
        directory.check_same()


def test_code_that_is_not_installed_knows_its_version(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, a job runs a copy of the code beside packages without bfsys."""

    def find(name: str, of: Callable[[str], Distribution] = Distribution.from_name) -> Distribution:
        if name == "bfsys":
            raise PackageNotFoundError(name)
        return of(name)

    monkeypatch.setattr(Distribution, "from_name", find)
    assert facts_of(config)["versions"]["bfsys"] == bfsys.__version__
    assert cli.dispatch(["--version"]) == 0


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of git have the variables of another repository. Another user may own the clone."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    git_state.cache_clear()
    if (here := git_state()) is None:
        pytest.skip("this is no clone of the repository")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    git_state.cache_clear()
    assert git_state() == here
