"""The formulas of a run's time against simulated runs, and against what ranks were seen to send."""

from __future__ import annotations

import math
import random

import pytest

from bfsys.run_time import RunTime, sent_bytes

RUN = RunTime(steps=1000, step_s=2.0, save_every=50, save_s=3.0, evaluations_s=100.0, restart_s=40.0)


def simulated_s(run: RunTime, mtbf_s: float, rng: random.Random) -> float:
    """Simulate a run with failures at random moments. Restarts may fail as well."""
    now, done, next_failure = 0.0, 0.0, math.inf
    now += run.restart_s
    next_failure = now + rng.expovariate(1 / mtbf_s)
    while done < run.work_s - 1e-9:
        needed = min(run.interval_s, run.work_s - done)
        needed += run.save_s * needed / run.interval_s
        if now + needed <= next_failure:
            now += needed
            done += run.interval_s
            continue
        now = next_failure
        next_failure = now + rng.expovariate(1 / mtbf_s)
        while now + run.restart_s > next_failure:
            now = next_failure
            next_failure = now + rng.expovariate(1 / mtbf_s)
        now += run.restart_s
    return now


@pytest.mark.parametrize("mtbf_s", [300.0, 1000.0, 20_000.0])
def test_the_expected_time_is_that_of_simulated_runs(mtbf_s: float) -> None:
    rng = random.Random(0)
    runs = 400
    mean = sum(simulated_s(RUN, mtbf_s, rng) for _ in range(runs)) / runs
    assert RUN.expected_s(mtbf_s) == pytest.approx(mean, rel=0.03)


def test_without_failures_the_parts_add_up() -> None:
    assert RUN.expected_s() == 40 + 2000 + 100 + 20 * 3
    assert RUN.expected_s(1e12) == pytest.approx(RUN.expected_s())


@pytest.mark.parametrize("mtbf_s", [300.0, 5000.0, 100_000.0])
@pytest.mark.parametrize("save_s", [0.3, 30.0])
def test_no_other_interval_is_better_than_the_best(mtbf_s: float, save_s: float) -> None:
    def expected_s(save_every: int) -> float:
        run = RunTime(steps=10_000, step_s=1.0, save_every=save_every, save_s=save_s, restart_s=20.0)
        return run.expected_s(mtbf_s)

    best = RunTime(10_000, 1.0, 1000, save_s, restart_s=20.0).best_save_every(mtbf_s)
    assert expected_s(best) <= 1.005 * min(map(expected_s, range(1, 10_001)))


def test_extremes_have_an_answer() -> None:
    assert RUN.best_save_every(math.inf) == RUN.steps
    assert RUN.best_save_every(1e-3) == 1
    assert RUN.expected_s(1e-3) == math.inf
    assert RunTime(10, 1.0, 1000).best_save_every(100) == 1
    assert RunTime(10, 1.0, 1000).interval_s == 10  # a run shorter than the interval saves at its end


# Bytes per parameter that each of 2 gloo ranks sent in a step: a model of 909,802 parameters, 866,304 of them in Muon's
# matrices. (Measured in a network namespace, with the counters of its interface.)
SEEN = {
    (0, "fp32", 1, False): 4.04, (0, "bf16", 2, False): 4.04, (1, "fp32", 2, False): 6.01, (1, "bf16", 1, False): 5.01,
    (2, "fp32", 1, False): 6.10, (2, "fp32", 2, False): 10.09, (2, "bf16", 2, False): 9.09,
    (0, "fp32", 1, True): 5.92, (0, "bf16", 1, True): 5.06, (1, "fp32", 1, True): 7.96, (1, "bf16", 2, True): 6.06,
    (2, "fp32", 2, True): 12.04,
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN)
def test_sent_bytes_agree_with_the_network_counters(case: tuple[int, str, int, bool]) -> None:
    stage, precision, micro_batches, muon = case
    told = sent_bytes(
        stage, 909_802, 2, micro_batches, bf16=precision == "bf16", muon_parameters=866_304 if muon else 0
    )
    assert told / 909_802 == pytest.approx(SEEN[case], rel=0.04)


def test_one_rank_sends_nothing() -> None:
    assert all(sent_bytes(stage, 1000, 1, 2, bf16=True, muon_parameters=500) == 0 for stage in range(4))
