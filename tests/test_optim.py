from __future__ import annotations

import pytest
import torch

from bfsys.config import Optim
from bfsys.dist import Ranks
from bfsys.model.byteformer import ByteFormer
from bfsys.model.sizes import architecture
from bfsys.muon import Span
from bfsys.optim import Held, Optimizer, ema_decay, learning_rate, parameter_groups


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


def small_model() -> ByteFormer:
    torch.manual_seed(0)
    return ByteFormer(architecture("custom", kernel=4, window=8, max_tokens=16, shift=4, dim=16, layers=2, heads=2), 3)


def ready(model: ByteFormer, optim: Optim) -> Optimizer:
    """An optimizer of a model that is not sharded."""
    optimizer = Optimizer(model, optim)
    together = [(group["is_muon"], group["params"]) for group in optimizer.param_groups]
    held = [Held(Span(name, 0, p.numel()), p, 0) for name, p in model.named_parameters()]
    optimizer.init_state(together, held, Ranks(), torch.float32)
    return optimizer


def test_biases_and_norms_do_not_decay() -> None:
    model = small_model()
    decayed, others = parameter_groups(model, Optim(weight_decay=0.05))
    assert {p.ndim for p in decayed["params"]} == {2, 3}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)


def test_muon_has_the_matrices_between_channels_and_nothing_else() -> None:
    model = small_model()
    groups = parameter_groups(model, Optim(name="muon"))
    names = {p: name for name, p in model.named_parameters()}
    (matrices,) = ([names[p] for p in group["params"]] for group in groups if group["is_muon"])
    of_blocks = [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "proj", "fc1", "fc2")]
    of_merges = [f"merges.{i}.reduction.weight" for i in (0, 1)]
    assert sorted(matrices) == sorted(["stem.kernel", *of_merges, *of_blocks])
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_adamw_is_torchs_and_the_average_follows() -> None:
    ours, theirs = small_model(), small_model()
    a = ready(ours, Optim(ema_decay=0.8))  # the decay stays constant, since `prepare` is not called again
    b = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.05},
         {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    average = ours.head.weight.detach().clone()
    for step in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        average = 0.8 * average + 0.2 * ours.head.weight.detach()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.state[ours.head.weight]["ema"], average)


def test_muon_has_a_rate_of_its_own_with_the_shape_of_adamws() -> None:
    optimizer = ready(small_model(), Optim(name="muon", lr=1e-3, muon_lr=5e-3))
    optimizer.prepare(5e-4, 0.9)
    rates = {group["is_muon"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {False: 5e-4, True: pytest.approx(2.5e-3)}


def test_a_skipped_step_changes_nothing() -> None:
    model = small_model()
    optimizer = ready(model, Optim(name="muon"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.prepare(1e-3, 0.9, skips=lambda: True)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.isfinite(t).all() for state in optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_has_the_states_of_its_optimizer(name: str) -> None:
    model = small_model()
    with_average, without = (ready(model, Optim(name=name, ema_decay=decay)) for decay in (0.9, 0.0))
    moments = ("exp_avg", "exp_avg_sq", "momentum_buffer") if name == "muon" else ("exp_avg", "exp_avg_sq")
    assert without.state_names == moments
    assert with_average.state_names == (*moments, "ema")
    for optimizer in (with_average, without):
        for parameter, p in model.named_parameters():
            expected = {state for state in optimizer.state_names if optimizer.has_state(parameter, state)}
            assert optimizer.state[p].keys() - {"step"} == expected
