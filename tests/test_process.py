from __future__ import annotations

import os
import pwd
import resource
from collections.abc import Iterator

import pytest

from bfsys import process


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    process.prepare()
    assert process.open_files_limit() == limits[1] > 64


@pytest.mark.parametrize(("has_entry", "name"), [(False, "uid-12345"), (True, None)])
def test_a_user_without_an_entry_gets_a_name(
    has_entry: bool, name: str | None, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)

    def getpwuid(uid: int) -> None:
        if not has_entry:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    process.prepare()
    assert os.environ.get("USER") == name
    os.environ.pop("USER", None)
