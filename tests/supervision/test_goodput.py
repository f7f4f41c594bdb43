from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfsys.supervision.goodput import CAUSES, FILE, STARTED, Ledger, goodput, read_seconds


def write(folder: Path, events: list[dict]) -> Path:
    (folder / FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def note(at: float, step: int, stall_s: float = 0.0, wait_s: float = 0.0) -> dict:
    return {"event": "note", "time": at, "step": step, "stall_s": stall_s, "wait_s": wait_s}


def test_every_second_has_its_cause(tmp_path: Path) -> None:
    """Started at 100, training from 110; step 4 saved at 150, killed at 170 in step 6; again at 180, from 4, at 195."""
    run = write(tmp_path, [
        {"event": "start", "time": 100, "step": 0},
        {"event": "begin", "time": 110},
        note(150, 4, stall_s=1, wait_s=2),
        note(170, 6, stall_s=3, wait_s=4),
        {"event": "start", "time": 180, "step": 4},
        {"event": "begin", "time": 195},
        note(225, 8, wait_s=5),
    ])  # fmt: skip
    seconds = read_seconds(run)
    assert seconds == {"productive": 40 - 3 + 30 - 5, "lost": 20, "restart": 10 + 25, "stall": 1, "data_wait": 2 + 5}
    assert sum(seconds.values()) == 225 - 100
    assert goodput(seconds) == pytest.approx(62 / 125)


def test_steps_of_all_earlier_attempts_that_are_repeated_are_lost(tmp_path: Path) -> None:
    """The third attempt resumes from step 50, because the checkpoints after it were damaged."""
    run = write(tmp_path, [
        {"event": "start", "time": 0, "step": 0},
        {"event": "begin", "time": 0},
        note(50, 50, stall_s=1),
        note(100, 100, stall_s=3),
        {"event": "start", "time": 100, "step": 100},
        {"event": "begin", "time": 100},
        note(200, 200, wait_s=7),
        {"event": "start", "time": 200, "step": 50},
        {"event": "begin", "time": 200},
        note(350, 200),
    ])  # fmt: skip
    assert read_seconds(run) == {"productive": 49 + 150, "lost": 150, "restart": 0, "stall": 1, "data_wait": 0}


def test_a_clock_that_is_set_back_makes_no_duration_negative(tmp_path: Path) -> None:
    run = write(tmp_path, [
        {"event": "start", "time": 1000, "step": 0},
        {"event": "begin", "time": 1010},
        note(1050, 4),
        {"event": "start", "time": 500, "step": 4},  # the clock was set back by half an hour between two starts
        {"event": "begin", "time": 520},
        note(560, 8),
    ])  # fmt: skip
    assert read_seconds(run) == {"productive": 40, "lost": 0, "restart": 10, "stall": 0, "data_wait": 0}


def test_a_start_continues_from_the_latest_event_although_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STARTED, "1000")
    run = write(tmp_path, [{"event": "start", "time": 4e9, "step": 0}, {"event": "begin", "time": 4e9}, note(4e9, 2)])
    ledger = Ledger(run, is_rank_zero=True)
    ledger.resumed(2)
    ledger.first_step_begins()
    time.sleep(0.05)
    ledger.record_progress(3)
    ledger.close()
    assert 0.05 <= read_seconds(run)["productive"] < 60


def test_an_incomplete_line_is_not_an_event(tmp_path: Path) -> None:
    run = write(tmp_path, [{"event": "start", "time": 0, "step": 0}, {"event": "begin", "time": 1}, note(5, 2)])
    with open(run / FILE, "a") as file:
        file.write('{"event": "note", "ti')
    assert sum(read_seconds(run).values()) == 5


@given(
    st.lists(
        st.tuples(
            st.floats(0, 50), st.booleans(), st.lists(st.tuples(st.floats(0.1, 50), st.integers(1, 9)), max_size=5)
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_causes_add_up_to_the_wall_time(tmp_path_factory: pytest.TempPathFactory, lives, rng) -> None:
    """This holds for kills at any time and resumes from any step."""
    events, now, made = [], 1000.0, [0]
    for pause, begins, notes in lives:
        now += pause
        step = rng.choice(made)
        events.append({"event": "start", "time": now, "step": step})
        if not begins:
            continue
        now += 1
        events.append({"event": "begin", "time": now})
        stall = wait = 0.0
        for seconds, steps in notes:
            stall, wait, now, step = stall + seconds / 8, wait + seconds / 4, now + seconds, step + steps
            made.append(step)
            events.append(note(now, step, stall, wait))
    run = write(tmp_path_factory.mktemp("ledger"), events)
    seconds = read_seconds(run)
    assert seconds.keys() == set(CAUSES)
    assert min(seconds.values()) >= -1e-6
    assert sum(seconds.values()) == pytest.approx(now - events[0]["time"], abs=1e-6)
