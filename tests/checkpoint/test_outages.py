"""An error of access, such as an outage of a file server, is never taken for a missing or damaged checkpoint."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from bfsys.checkpoint import files, loading, retention
from bfsys.checkpoint.files import step_of
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.dist import AgreedError
from bfsys.errors import UserError
from tests.checkpoint.test_checkpoint import resume, same, save


@pytest.mark.parametrize("what", [files.MANIFEST, "weight-0-of-1.safetensors"])
def test_reads_are_retried_while_a_file_server_is_away(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    failures = iter(range(2))
    really_open = io.open

    def open_or_not(path, *arguments, **options):
        if Path(path).name == what and next(failures, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return really_open(path, *arguments, **options)

    for module in (io, builtins):  # pathlib uses io.open, other code builtins.open
        monkeypatch.setattr(module, "open", open_or_not)
    monkeypatch.setattr(files, "PAUSES_S", (0.0, 0.0))
    engine, path, said = resume(tmp_path)
    assert (step_of(path), said, next(failures, None)) == (2, [], None)
    failures = itertools.repeat(0)
    with pytest.raises(AgreedError, match=r"Stale file handle; start again when its server is back") as error:
        resume(tmp_path)
    assert error.value.exit_code == 1  # not a final code, so launchers restart the run
    with pytest.raises(UserError, match="Stale file handle"):
        files.find_whole(tmp_path)
    if what == files.MANIFEST:
        with pytest.raises(UserError, match="Stale file handle"):
            loading.newest_readable(tmp_path)
    failures = iter(())
    assert same(resume(tmp_path)[0], engine)
    assert [p.name for p in files.all_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(("error", "code"), [(errno.EACCES, 2), (errno.EMFILE, 2), (errno.ESTALE, 1), (errno.EIO, 1)])
def test_unlistable_checkpoints_do_not_count_as_missing(
    tmp_path: Path, error: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run would start over, and set its history aside."""
    save(tmp_path, 1)
    really_scan = os.scandir

    def scan(path):
        if Path(path).name == "checkpoints":
            raise OSError(error, os.strerror(error), str(path))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    for read in (loading.newest_readable, files.find_whole, files.all_checkpoints, resume):
        with pytest.raises(UserError, match=rf"checkpoints: cannot be read.*: {os.strerror(error)}") as raised:
            read(tmp_path)
        assert raised.value.exit_code == code
        assert "remove" not in str(raised.value)


@pytest.mark.parametrize("number", [errno.EREMOTEIO, errno.EPROTO, errno.EBUSY])
def test_an_unlisted_error_number_does_not_count_as_damage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file that is missing, or that is something else than a file, is damage."""
    for step in (1, 2):
        save(tmp_path, step)
    really_read, failing = files.read_regular, [files.MANIFEST]

    def read(path: Path) -> bytes:
        if Path(path).name in failing:
            raise OSError(number, os.strerror(number), str(path))
        return really_read(path)

    for module in (files, loading):
        monkeypatch.setattr(module, "read_regular", read)
    monkeypatch.setattr(files, "PAUSES_S", ())
    for name in (files.MANIFEST, "weight-0-of-1.safetensors"):
        failing[:] = [name]
        with pytest.raises(AgreedError, match=f"{name}: cannot be read at the moment") as error:
            resume(tmp_path)
        assert error.value.exit_code == 1
    assert [p.name for p in files.all_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("what", [files.MANIFEST, "weight-0-of-1.safetensors"])
def test_a_file_without_permission_is_not_taken_for_damaged(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    really_open = io.open

    def open_or_not(path, *arguments, **options):
        if str(path).endswith(f"step_00000002/{what}"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **options)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", open_or_not)
    for read in (resume, files.find_whole):
        with pytest.raises(UserError, match=f"{what}: cannot be read: Permission denied"):
            read(tmp_path)
    assert [p.name for p in files.all_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EACCES])
def test_the_best_checkpoints_stay_if_the_scores_cannot_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 1, "top1": 0.9, "loss": 1.0}\n')
    keep = RetentionPolicy(last=1, best=1)
    for step in (1, 2):
        save(tmp_path, step, keep=keep)
    really_open = retention.open_regular

    def open_or_fail(path: Path) -> BinaryIO:
        if path == tmp_path / "metrics.jsonl":
            raise OSError(number, os.strerror(number), str(path))
        return really_open(path)

    monkeypatch.setattr(files, "PAUSES_S", ())
    monkeypatch.setattr(retention, "open_regular", open_or_fail)
    with pytest.raises(AgreedError, match=rf"metrics\.jsonl: cannot be read.*: {os.strerror(number)}"):
        save(tmp_path, 3, keep=keep)
    assert [step_of(path) for path in files.all_checkpoints(tmp_path)] == [1, 2, 3]
