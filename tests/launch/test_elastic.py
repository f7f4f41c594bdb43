"""The choice of the number of nodes or ranks, and when a job grows; small scripts simulate SLURM."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfsys.cli import call
from bfsys.data.streaming.plan import lanes_of_rank
from bfsys.errors import UserError
from bfsys.launch import elastic, local
from tests.launch.test_requeue import save

LANES = st.integers(1, 256)
JOB = {"Command": "/job.sh", "Partition": "batch", "NodeList": "n[1-2]", "ExcNodeList": "(null)"}


@given(LANES, st.integers(1, 40), st.integers(0, 40), st.integers(1, 8))
def test_every_number_that_shares_the_lanes_evenly_fits(lanes: int, low: int, more: int, each: int) -> None:
    numbers = range(low, low + more + 1)
    found = elastic.fitting(lanes, numbers, each)
    assert found == sorted(set(found))
    for number in numbers:
        if number in found:
            shares = [lanes_of_rank(lanes, rank, number * each) for rank in range(number * each)]
            assert [lane for share in shares for lane in share] == list(range(lanes))
        else:
            with pytest.raises(UserError):
                lanes_of_rank(lanes, 0, number * each)


@given(LANES, st.integers(1, 12), st.integers(1, 12), st.integers(1, 16))
def test_ranks_are_the_most_that_fit_and_are_there(lanes: int, low: int, more: int, cores: int) -> None:
    asked = range(low, low + more + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "usable_cores", lambda: cores)
        possible = [n for n in asked if n <= cores and lanes % n == 0]
        if possible:
            assert local.choose_ranks(lanes, asked) == max(possible)
        else:
            with pytest.raises(UserError, match=f"--ranks: got {low} to {low + more}; {lanes} lanes?"):
                local.choose_ranks(lanes, asked)


@given(st.integers(1, 999), st.integers(1, 999))
def test_ranges_are_read_as_sbatch_reads_them(low: int, high: int) -> None:
    numbers = elastic.parse_range(f"{low}-{high}")
    assert numbers == (range(low, high + 1) if low <= high else None)
    assert elastic.parse_range(str(low)) == range(low, low + 1)


@pytest.mark.parametrize("text", ["", "0", "0-2", "-2", "2-", "2-4-8", "two", "2.5", "\u0662", "4-2"])
def test_invalid_ranges_are_rejected(text: str, config_file: Path) -> None:
    assert elastic.parse_range(text) is None
    for command, option in (("slurm", "nodes"), ("launch", "ranks")):
        with pytest.raises(UserError) as error:
            call(command, [f"--{option}={text}", "--dry-run", str(config_file)])
        assert f"--{option}: got {text!r}; N or MIN-MAX is allowed" in error.value.problems[0]


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`slurm_says(sbatch=…, squeue=…)` replaces them by shell commands."""

    def say(**scripts: str) -> None:
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return say


def starts_in(seconds: float) -> str:
    at = (datetime.datetime.now() + datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")
    return f"echo 'sbatch: Job 9 to start at {at} using 4 processors on nodes n3 in partition batch' >&2"


def test_nodes_are_free_if_slurm_would_start_a_job_on_them_and_no_job_waits(slurm_says) -> None:
    asked = "--test-only --dependency= --nodes=3 --exclude=n[1-2] /job.sh"
    slurm_says(sbatch=f'[ "$*" = "{asked}" ] && {starts_in(0)}', squeue="")
    assert elastic.can_start(3, JOB)
    assert not elastic.can_start(2, JOB)  # sbatch above refuses it
    assert not elastic.can_start(3, {})  # SLURM does not answer
    slurm_says(squeue="echo Dependency; echo BeginTime")
    assert elastic.can_start(3, JOB)
    for reason in ("Resources", "Priority"):
        slurm_says(squeue=f"echo {reason}")
        assert not elastic.can_start(3, JOB)
    slurm_says(squeue="", sbatch=starts_in(3600))
    assert not elastic.can_start(3, JOB)
    slurm_says(squeue="exit 1", sbatch=starts_in(0))
    assert not elastic.can_start(3, JOB)


def test_nodes_of_the_job_itself_and_nodes_that_the_user_excludes_are_not_free(slurm_says) -> None:
    slurm_says(sbatch=f"""[ "$4" = "--exclude=n[1-2],n7" ] && {starts_in(0)}""", squeue="")
    assert elastic.can_start(1, {**JOB, "ExcNodeList": "n7"})


def test_a_users_choice_of_shown_jobs_hides_none_that_waits(slurm_says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "me")
    slurm_says(squeue='[ -n "$SQUEUE_USERS" ] || echo Resources', sbatch=starts_in(0))
    assert not elastic.can_start(3, JOB)


def test_sbatch_is_not_told_of_the_job_that_asks(slurm_says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "9")
    monkeypatch.setenv("SLURM_CLUSTERS", "beta")
    slurm_says(sbatch=f'[ "$SLURM_NTASKS $SLURM_CLUSTERS" = " beta" ] && {starts_in(0)}', squeue="")
    assert elastic.can_start(1, JOB)


def test_a_job_grows_after_its_interval_once_it_has_saved(slurm_says, tmp_path: Path, monkeypatch) -> None:
    slurm_says(sbatch=starts_in(0), squeue="")
    save(tmp_path, 4)
    growth = elastic.Growth(tmp_path, used=2, larger=4, every_s=100)
    now = growth.began
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now)

    def is_due(seconds: float) -> bool:
        nonlocal now
        now = growth.began + seconds
        return growth.is_due(lambda: JOB)

    assert not is_due(101)  # no checkpoint was saved
    save(tmp_path, 8)
    assert not is_due(99)
    slurm_says(squeue="echo Priority")
    assert not is_due(102)
    slurm_says(squeue="")
    assert not is_due(150)  # the last request was too recent
    assert not elastic.has_grown_in_vain(tmp_path, used=2)
    assert is_due(170)
    assert elastic.has_grown_in_vain(tmp_path, used=2)
    assert not elastic.has_grown_in_vain(tmp_path, used=2)  # the start after that may try again
    assert is_due(300)
    assert not elastic.has_grown_in_vain(tmp_path, used=4)


def test_a_job_takes_the_largest_number_that_it_has_and_gives_back_the_rest(
    slurm_says, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.chdir(tmp_path)
    slurm_says(scontrol='echo "$*" >> asked; touch slurm_job_42_resize.sh slurm_job_42_resize.csh; exit ${REFUSED:-0}')
    for got, used, said in (("2", 2, "takes 2 "), ("4", 4, "takes 4 "), ("7", 4, "; 3 released")):
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", got)
        assert elastic.use_nodes([2, 4, 8]) == used
        assert said in capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == "update JobId=42 NumNodes=4\n"
    assert not list(tmp_path.glob("slurm_job_*"))
    monkeypatch.setenv("REFUSED", "1")
    assert elastic.use_nodes([2, 4, 8]) == 4
    assert "3 idle: SLURM refused" in capsys.readouterr().out
