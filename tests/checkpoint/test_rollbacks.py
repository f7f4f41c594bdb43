"""Copies of checkpoints around bad steps and roll-backs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bfsys.checkpoint import copier, saving
from bfsys.checkpoint.copies import Copies
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.checkpoint.rollbacks import was_rolled_back
from bfsys.checkpoint.store import Store
from tests.checkpoint.test_checkpoint import ALONE, FACTS, Tensors, save
from tests.checkpoint.test_store import KEEP, put


@pytest.mark.parametrize(("steps", "is_copied"), [(9, False), (3, True)], ids=["midway", "at the end"])
def test_a_checkpoint_after_bad_steps_is_copied_only_at_the_end(tmp_path: Path, steps: int, is_copied: bool) -> None:
    changed = {"guard": {"in_a_row": [{"step": 3}]}, "config": {"train": {"steps": steps}}}
    facts = {**FACTS, "step": 3, "updates": 3, **changed}
    path = saving.save(Tensors(3), tmp_path / "run", facts, ranks=ALONE, keep=RetentionPolicy(2))
    store = Store(f"file://{tmp_path}/copies/mine")
    answer = copier.copy(store, {"path": str(path), "run_dir": str(tmp_path / "run"), "keep": KEEP})
    assert answer.keys() == (set() if is_copied else {"left_out"})
    assert store.names() == [path.name] * is_copied


def test_a_checkpoint_that_is_left_out_is_not_called_copied(tmp_path: Path) -> None:
    changed = {"guard": {"in_a_row": [{"step": 3}]}, "config": {"train": {"steps": 9}}}
    facts = {**FACTS, "step": 3, "updates": 3, **changed}
    saving.save(Tensors(3), tmp_path / "run", facts, ranks=ALONE, keep=RetentionPolicy(2))
    copies = Copies(tmp_path / "run", f"file://{tmp_path}/copies/mine", RetentionPolicy(2))
    copies.offer()
    said = ""
    while copies.copying:
        said += copies.attend()
        time.sleep(0.01)
    assert said == (
        "step_00000003 is not copied: it was saved after a bad step, so the run may have to roll back further"
    )
    assert copies.newest_is_left_out
    assert copies.problem_of_newest() == ""


ROLLBACK = {"from": 5, "to": 3, "updates": 3, "steps": [4, 5], "bad": []}


def test_copies_that_a_roll_back_has_undone_are_not_used(tmp_path: Path) -> None:
    """The run's last step was bad when it was copied. Then the run was given more steps, and rolled back."""
    store, run = Store(f"file://{tmp_path}/copies/mine"), tmp_path / "run"
    for step in (3, 4):
        put(store, save(run, step))
    task = {"run_dir": str(run), "after": 3, "until": None}
    work = Path(copier.fetch(store, task)["work"])
    assert work.name.startswith(".step_00000004")
    (run / "rollbacks.json").write_text(json.dumps([ROLLBACK]))
    assert "work" not in copier.fetch(store, task)
    path = saving.save(Tensors(6), run, {**FACTS, "step": 6, "updates": 4}, ranks=ALONE, keep=RetentionPolicy(9))
    copier.copy(store, {"path": str(path), "run_dir": str(run), "keep": {**KEEP, "last": 9}})
    assert store.names() == ["step_00000003", "step_00000006"]


@pytest.mark.parametrize(
    ("step", "updates", "is_undone"),
    [(3, 3, False), (4, 4, True), (4, 3, False), (5, 5, True), (5, 3, False), (6, 6, False)],
)
def test_a_checkpoint_of_before_a_roll_back_has_more_updates(step: int, updates: int, is_undone: bool) -> None:
    assert was_rolled_back({"step": step, "updates": updates}, [ROLLBACK]) == is_undone
