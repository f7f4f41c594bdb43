from __future__ import annotations

import pytest
import torch

from bfsys.config import Optim
from bfsys.optim import AdamW, ema_decay, learning_rate, parameter_groups


def test_the_learning_rate_warms_up_and_ends_where_it_should() -> None:
    optim = Optim(lr=1e-3, final_lr=2e-5, warmup_lr=1e-6, warmup_steps=10)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[0] == 1e-6
    assert rates[10] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(2e-5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[5] - rates[4] == pytest.approx(rates[9] - rates[8])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5)])
def test_the_shortest_runs_have_a_learning_rate(steps: int, warmup: int) -> None:
    rates = [learning_rate(s, steps, Optim(warmup_steps=warmup)) for s in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_the_average_forgets_the_initial_weights_in_short_runs_too() -> None:
    left = 1.0
    for step in range(150):
        left *= ema_decay(step, Optim(ema_decay=0.9999))
    assert left < 1e-6
    assert ema_decay(10**6, Optim(ema_decay=0.9999)) == 0.9999


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, others = parameter_groups(model, 0.05)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert len(others["params"]) == 3
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)


def test_steps_are_torchs_and_the_average_follows() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    theirs.load_state_dict(ours.state_dict())
    optim = Optim(ema_decay=0.8)  # constant: `prepare` is not called again
    a = AdamW(parameter_groups(ours, 0.05), optim)
    b = torch.optim.AdamW(parameter_groups(theirs, 0.05), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    a.init_state(ours.parameters())
    average = ours.weight.detach().clone()
    for _ in range(5):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
        average = 0.8 * average + 0.2 * ours.weight.detach()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.state[ours.weight]["ema"], average)


def test_no_average_is_kept_without_a_decay() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = AdamW(parameter_groups(model, 0.0), Optim(ema_decay=0.0))
    optimizer.init_state(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.state_names == ("exp_avg", "exp_avg_sq")
    assert "ema" not in optimizer.state[model.weight]
