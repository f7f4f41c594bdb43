"""A dataset is replaced as a whole or not at all; one process at a time packs it."""

import errno
import fcntl
import os
import signal

import pytest

from bfsys.data.packing import shard_jobs, staging
from bfsys.errors import UserError
from tests.commands.packing_helpers import all_bytes, contents, make_tree, pack, problems_of

SMALL = ("--shard-bytes", "9K")


class Killed(BaseException):
    """Simulates the death of the process."""


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def packed(tmp_path):
    """(source, folder): a dataset whose source has changed since it was packed."""
    src = make_tree(tmp_path / "src")
    folder = pack(src, tmp_path / "out", *SMALL)
    (src / "cat" / "001.jpg").write_bytes(b"x" * 9301)
    return src, folder


def without_progress(folder):
    return {name: data for name, data in all_bytes(folder).items() if not name.startswith(".pack/")}


@pytest.mark.parametrize("last", ["write_shard", "write_split", "write_description"])
def test_packing_that_ends_early_leaves_the_old_dataset(packed, monkeypatch, last):
    src, folder = packed
    before = without_progress(folder)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs, last, die)
        with pytest.raises(Killed):
            pack(src, folder.parent, *SMALL)
    assert without_progress(folder) == before
    assert contents(pack(src, folder.parent, *SMALL))["cat/001"][2] == b"x" * 9301


def test_a_bad_file_leaves_the_old_dataset(packed):
    src, folder = packed
    before = without_progress(folder)
    (src / "dog" / "note.txt").write_bytes(b"no picture")
    assert "note.txt: cannot be converted to png" in problems_of(src, folder.parent, "--encoding", "png")
    assert without_progress(folder) == before


@pytest.mark.parametrize("moves", range(9))
def test_killed_while_files_are_put_into_place_the_next_command_completes_it(packed, monkeypatch, moves):
    src, folder = packed
    replace, moved = os.replace, []

    def move(source, target):
        if source.name == "inputs.new" or target.parent == folder:
            if len(moved) == moves:
                raise Killed
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        with pytest.raises(Killed):
            pack(src, folder.parent, *SMALL)
    assert not (folder / "dataset.json").exists()  # so it does not count as complete
    other = pack(src, folder.parent.parent / "other", *SMALL)
    (src / "cat" / "empty").write_bytes(b"")
    assert "is empty" in problems_of(src, folder.parent, *SMALL)
    assert without_progress(folder).keys() >= without_progress(other).keys()
    assert contents(folder)["cat/001"][2] == b"x" * 9301  # also after a command that is refused
    (src / "cat" / "empty").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs, "write_shard", None)
        pack(src, folder.parent, *SMALL)
    assert all_bytes(folder) == all_bytes(other)


def test_killed_before_the_staged_files_are_moved_the_old_dataset_stays(packed, monkeypatch):
    src, folder = packed
    before = without_progress(folder)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "put_into_place", None)
        with pytest.raises(TypeError):
            pack(src, folder.parent, *SMALL)
    (src / "cat" / "empty").write_bytes(b"")
    problems_of(src, folder.parent, *SMALL)
    assert without_progress(folder) == before


def test_signals_do_not_part_the_moves(packed, monkeypatch):
    src, folder = packed
    replace = os.replace

    def interrupted(source, target):
        if target.parent == folder:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        replace(source, target)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "replace", interrupted)
    assert contents(pack(src, folder.parent, *SMALL))["cat/001"][2] == b"x" * 9301
    assert signal.getsignal(signal.SIGINT) is handler


def test_shards_of_another_run_do_not_stay_in_the_staging_folder(packed, monkeypatch):
    src, folder = packed
    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs, "write_split", None)
        with pytest.raises(TypeError):
            pack(src, folder.parent, "--shard-bytes", "5K")
    (folder / ".pack" / "@eaDir").mkdir()
    (folder / "notes.md").write_bytes(b"the user's")
    pack(src, folder.parent, *SMALL)
    assert sorted(path.name for path in (folder / ".pack").iterdir()) == ["@eaDir", "inputs", "lock"]
    assert (folder / "notes.md").exists()


def test_a_second_process_is_refused(packed):
    src, folder = packed
    before = without_progress(folder)
    with staging.locked(folder):
        message = problems_of(src, folder.parent, *SMALL)
        with pytest.raises(UserError, match="another process is packing into this folder"):
            staging.recover(folder)
    assert message == (
        f"{folder}: another process is packing into this folder; wait until it has ended, or choose another --name"
    )
    assert without_progress(folder) == before
    pack(src, folder.parent, *SMALL)  # the lock was released


def test_a_process_that_packed_meanwhile_is_noticed(tmp_path, monkeypatch):
    src = make_tree(tmp_path / "src")
    plan_jobs = shard_jobs.plan_jobs

    def plan_late(*arguments):
        monkeypatch.setattr(shard_jobs, "plan_jobs", plan_jobs)
        pack(src, tmp_path, "--split", "train")
        return plan_jobs(*arguments)

    monkeypatch.setattr(shard_jobs, "plan_jobs", plan_late)
    assert "holds a dataset with split train, which this command" in problems_of(src, tmp_path, "--split", "test")


def test_a_file_system_without_locks_is_packed_into(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert len(contents(pack(make_tree(tmp_path / "src"), tmp_path))) == 30
