"""Launchers of these tests start ranks on the CPU, also where there is a GPU."""

import pytest


@pytest.fixture(autouse=True)
def _ranks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
