"""Stops of the local launcher while no ranks run."""

from __future__ import annotations

import signal

import pytest

from bfsys.cli import call
from bfsys.errors import run_command
from bfsys.launch import local
from bfsys.supervision.run_end import how_it_ended, note_end
from bfsys.supervision.signals import EXIT_CODES


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_stop_before_there_are_ranks_is_a_stop(config_file, monkeypatch, capsys, number):
    monkeypatch.setattr(local, "choose_ranks", lambda *_: signal.raise_signal(number))
    with pytest.raises(SystemExit) as end:
        run_command(lambda: call("launch", [str(config_file)]))
    assert end.value.code == EXIT_CODES[number]
    assert capsys.readouterr().err == "stopped on request\n"


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_stop_between_two_starts_is_recorded(tmp_path, monkeypatch, capsys, number):
    note_end(tmp_path, 1, "rank 0: RuntimeError")
    monkeypatch.setattr(local.time, "sleep", lambda _: signal.raise_signal(number))
    with pytest.raises(SystemExit) as end:
        run_command(lambda: local.run_until_done(lambda: 1, tmp_path))
    assert end.value.code == how_it_ended(tmp_path)["exit_code"] == EXIT_CODES[number]
    assert capsys.readouterr().err.endswith("\nstopped on request\n")
