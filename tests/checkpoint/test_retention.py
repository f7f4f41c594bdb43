"""Which checkpoints of a run are kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfsys.checkpoint import files, retention, saving
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.checkpoint.store import Store
from bfsys.cli import call
from bfsys.errors import EXIT_CRASHED, UserError
from tests.checkpoint.test_checkpoint import ALONE, FACTS, Tensors, save
from tests.checkpoint.test_store import put


@given(
    steps=st.sets(st.integers(0, 200), min_size=1),
    last=st.integers(1, 4),
    every=st.integers(0, 30),
    best=st.integers(0, 3),
    scores=st.dictionaries(st.integers(0, 200), st.floats(0, 1)),
)
def test_retention_keeps_the_last_the_multiples_and_the_best(
    steps: set[int], last: int, every: int, best: int, scores: dict[int, float]
) -> None:
    told = {step: {"top1": score, "loss": 1 - score} for step, score in scores.items()}
    kept = retention.steps_to_keep(sorted(steps), RetentionPolicy(last, every, best, "top1"), told)
    assert kept <= steps
    assert set(sorted(steps)[-last:]) <= kept
    assert not every or {step for step in steps if step and step % every == 0} <= kept
    scored = sorted(scores[step] for step in steps if step in scores)
    if best and scored:
        assert max(scored) == max(scores[step] for step in kept if step in scores)
    assert len(kept) <= last + best + (len(steps) if every else 0)


def test_scores_of_other_evaluation_files_are_not_compared() -> None:
    scores = {
        1: {"top1": 0.9, "evaluated": "a"},
        2: {"top1": 0.5, "evaluated": "b"},
        3: {"top1": 0.4, "evaluated": "b"},
    }
    assert retention.comparable(scores) == {2: scores[2], 3: scores[3]}
    assert retention.comparable({0: {"top1": 0.1}, **scores}).keys() == {0, 2, 3}  # earlier versions recorded no files
    assert retention.comparable({}) == {}


def test_the_best_of_losses_is_the_least() -> None:
    told = {step: {"loss": float(abs(step - 5))} for step in range(10)}
    assert retention.steps_to_keep(range(10), RetentionPolicy(1, 0, 2, "loss"), told) == {9, 5, 6}


def test_a_loss_that_is_not_a_number_is_the_worst() -> None:
    told = {step: {"loss": float("nan") if step % 2 else float(step)} for step in range(6)}
    assert retention.steps_to_keep(range(6), RetentionPolicy(1, 0, 2, "loss"), told) == {5, 0, 2}


def test_a_run_keeps_what_it_was_told_to(tmp_path: Path) -> None:
    lines = [{"kind": "eval", "step": step, "top1": top1, "loss": 1.0} for step, top1 in ((2, 0.9), (4, 0.5), (6, 0.7))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(8):
        save(tmp_path, step, keep=RetentionPolicy(last=1, every=5, best=1))
    assert [files.step_of(path) for path in files.all_checkpoints(tmp_path)] == [2, 5, 7]


def test_a_renamed_checkpoint_neither_counts_nor_removes_others(tmp_path: Path, capsys) -> None:
    renamed = save(tmp_path, 1).rename(tmp_path / "checkpoints" / "step_00000100")
    with pytest.raises(UserError, match=r"step_00000100: holds the checkpoint of step 1, .* to step_00000001"):
        files.find_newest(tmp_path)
    save(tmp_path, 2, keep=RetentionPolicy(1))
    assert [files.step_of(path) for path in files.all_checkpoints(tmp_path)] == [2, 100]
    assert call("checkpoint", ["list", str(tmp_path)]) == 0
    assert call("checkpoint", ["verify", str(tmp_path)]) == 2
    assert "holds the checkpoint of step 1" in capsys.readouterr().out
    backup = renamed.rename(tmp_path / "backup")
    assert (files.problems_of(backup), files.find_newest(tmp_path)[1]) == ([], [])


def test_the_newest_checkpoint_may_be_on_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    links = [save(tmp_path, step) for step in (1, 2)]
    for link in links:
        link.rename(tmp_path / link.name)
        link.symlink_to(tmp_path / "disk" / link.name)
    with pytest.raises(
        UserError, match=r"step_00000002: links to .*/disk/step_00000002, which does not exist"
    ) as error:
        files.all_checkpoints(tmp_path)
    assert error.value.exit_code == EXIT_CRASHED
    save(tmp_path, 3)  # earlier ones may be in an archive
    assert [files.step_of(path) for path in files.all_checkpoints(tmp_path)] == [3]


def test_prune_removes_the_checkpoints_that_are_not_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(FACTS, "config", {"train": {"keep_checkpoints": 2}})
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000004" / "weight-0-of-1.safetensors").unlink()
    assert call("checkpoint", ["prune", str(tmp_path), "--dry-run"]) == 0
    assert "would be removed" in capsys.readouterr().out
    assert len(files.all_checkpoints(tmp_path)) == 4
    assert call("checkpoint", ["prune", str(tmp_path), "--keep", "1"]) == 0
    files.remove(tmp_path / "checkpoints" / "step_00000002")  # like a run that removes it at the same time
    # A damaged checkpoint does not count for retention, and is not removed.
    assert [files.step_of(path) for path in files.all_checkpoints(tmp_path)] == [3, 4]
    (tmp_path / "checkpoints" / "step_00000004" / "manifest.json").write_text("{}")
    assert call("checkpoint", ["prune", str(tmp_path), "--dry-run"]) == 0  # the older manifest has the rules too


def test_the_copies_follow_the_retention_policy(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/copies/mine")
    for step in range(6):
        put(store, save(tmp_path / "run", step))
    store.prune(RetentionPolicy(last=1, every=3, best=1), {4: {"top1": 0.9}, 2: {"top1": 0.1}})
    assert store.names() == [f"step_{step:08d}" for step in (3, 4, 5)]


def test_a_renamed_copy_neither_counts_nor_removes_others(tmp_path: Path) -> None:
    store, root = Store(f"file://{tmp_path}/copies/mine"), tmp_path / "copies" / "mine" / "checkpoints"
    for step in (2, 3):
        put(store, save(tmp_path / "run", step))
    (root / "step_00000002").rename(root / "step_00000100")
    (root / "step_00000003" / "manifest.json").rename(root / "step_00000003" / "no manifest")
    put(store, save(tmp_path / "run", 4))
    store.prune(RetentionPolicy(last=1), {})
    assert store.names() == ["step_00000004", "step_00000100"]


def test_a_link_to_a_checkpoint_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    link = save(tmp_path, 1)
    target = link.rename(tmp_path / "elsewhere")
    link.symlink_to(target)
    files.remove(link)
    link.symlink_to(target)
    saving._remove_all([files.retire(link)])
    (link.parent / ".step_00000001.1-1.removed").symlink_to(target)  # of a process that was killed
    save(tmp_path, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000002", "latest"}
    assert files.problems_of(target) == []


def test_a_slow_removal_at_the_end_of_a_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_remove = saving._remove_all
    may_end = threading.Event()

    def remove_when_told(folders: list[Path]) -> None:
        may_end.wait(900)
        really_remove(folders)

    def close(step: int, silent_s: float) -> list[str]:
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            may_end.set()

        monkeypatch.setattr(saving, "SILENT_S", silent_s)
        saver = saving.Saver(tmp_path, ALONE, RetentionPolicy(1))
        saver.start(Tensors(0), {**FACTS, "step": step, "updates": step})
        saver.finish()
        saver.close(say)
        return said

    assert close(0, 60) == []  # the removal is quick
    monkeypatch.setattr(saving, "_remove_all", remove_when_told)
    (said,) = close(1, 0.1)
    assert said.startswith("waiting until old checkpoints of ")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step_00000001"]
