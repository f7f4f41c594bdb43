"""Ranks from the launchers' variables; agreement among several ranks is tested by whole runs (test_train.py)."""

from __future__ import annotations

import errno

import pytest

from bfsys import dist
from bfsys.errors import UserError

LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_TASKS_PER_NODE",
)  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, dist.Ranks()),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            dist.Ranks(5, 8, 1, 4),
        ),  # torchrun
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, dist.Ranks(5, 8, 1, 4)),  # deepspeed
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"},
            dist.Ranks(5, 8, 1, 4),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, dist.Ranks()),  # an interactive shell
    ],
)
def test_ranks_come_from_the_launcher(
    variables: dict[str, str], ranks: dist.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist.ranks_from_environment() == ranks


def test_several_ranks_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "12345")
    with pytest.raises(UserError, match="MASTER_ADDR is not set, so 2 ranks cannot meet"):
        dist.start(dist.Ranks(0, 2, 0, 2), timeout_s=1)


def test_a_process_on_its_own_agrees_with_itself() -> None:
    assert dist.agree_on_max(3, 1) == (3, 1)
    assert dist.from_first_rank("x") == "x"
    assert dist.gather_to_all("x") == ["x"]


@pytest.mark.parametrize("error", [UserError("one", "two"), OSError(13, "Permission denied", "file")])
def test_errors_are_agreed_on(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(dist.AgreedError) as agreed:
        dist.same_errors_on_all(fail)
    assert "Permission denied" in str(agreed.value) or agreed.value.problems == ("one", "two")
    assert agreed.value.exit_code == 2


def test_what_may_pass_has_the_code_of_a_crash() -> None:
    def fail() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(dist.AgreedError) as agreed:
        dist.same_errors_on_all(fail)
    assert agreed.value.exit_code == 1
