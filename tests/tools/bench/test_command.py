"""Numbers below their limit are refused with a line that says what is allowed."""

from __future__ import annotations

import argparse

import pytest

from tools.bench import bench_checkpoint, bench_remote
from tools.bench.command import at_least, positive


def test_numbers_at_the_limit_are_taken() -> None:
    assert at_least(2)("2") == 2
    assert positive("1e-3") == 0.001


@pytest.mark.parametrize("text", ["1", "0", "-3", "2.0", "two", "", "²"])
def test_other_whole_numbers_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 2 is needed"):
        at_least(2)(text)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "x"])
def test_numbers_that_are_not_positive_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a number above 0 is needed"):
        positive(text)


def test_benchmarks_say_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in (
        (bench_checkpoint.main, ["--ranks", "0"]),
        (bench_remote.main, ["--nodes", "0"]),
        (bench_remote.main, ["--nodes", "2", "--epochs", "1"]),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert f"got '{arguments[-1]}'; a whole number of at least" in capsys.readouterr().err
