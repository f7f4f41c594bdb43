"""Copies of checkpoints in a store: an S3 server that fails in every way, and a folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

from bfsys.checkpoint import copier, saving
from bfsys.checkpoint.child import start_child
from bfsys.checkpoint.copies import Copies, Wanted, fetch_newest
from bfsys.checkpoint.files import MANIFEST, all_checkpoints, commit, read_manifest, take_over
from bfsys.checkpoint.retention import RetentionPolicy
from bfsys.checkpoint.store import Store, StoreError
from bfsys.cli import call
from bfsys.errors import EXIT_CRASHED, EXIT_USER_ERROR, UserError
from bfsys.supervision.supervisor import HISTORY
from tests.checkpoint.test_checkpoint import ALONE, FACTS, Tensors, save
from tests.s3_server import RESET, S3Server

KEEP = {"last": 2, "every": 0, "best": 0, "metric": "top1"}


@pytest.fixture
def on_s3(s3: S3Server) -> Store:
    return Store("s3://bucket/copies/mine", pauses_s=(0.01, 0.01))


def put(store: Store, path: Path) -> None:
    store.put(path, read_manifest(path))


def fetched(store: Store, name: str, run: Path) -> Path:
    work = run / "checkpoints" / ".work.part"
    work.mkdir(parents=True)
    assert store.fetch(name, store.manifest_or_error(name), work) == []
    take_over(work, run / "checkpoints" / name)
    return run / "checkpoints" / name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_copy_on_s3_is_the_checkpoint(on_s3: Store, s3: S3Server, tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3)
    put(on_s3, path)
    assert {key.rpartition("/")[2] for key in s3.keys("copies/mine/checkpoints/step_00000003/")} == set(content(path))
    written = [request for request in s3.requests if request.startswith("PUT /bucket/copies")]
    assert written[-1].endswith(MANIFEST)  # it marks the copy as complete
    assert content(fetched(on_s3, path.name, tmp_path / "other")) == content(path)
    assert (tmp_path / "other" / "checkpoints" / "latest").read_text().strip() == path.name
    s3.requests.clear()
    put(on_s3, path)
    assert not [request for request in s3.requests if request.startswith(("PUT", "POST", "DELETE"))]


def test_a_server_that_fails_for_a_while_is_asked_again(s3: S3Server, tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3)
    store = Store("s3://bucket/copies/mine", pauses_s=(0.01,) * 8)
    # Each request fails twice. Faults in turn for all requests could hit one file at every try, since four are copied
    # at a time.
    faults = defaultdict(lambda: iter((503, RESET)))
    s3.fault = lambda request: next(faults[request], None) if "step_" in request else None
    put(store, path)
    assert content(fetched(store, path.name, tmp_path / "other")) == content(path)
    assert len(faults) > len(content(path))
    assert all(next(left, None) is None for left in faults.values())


def test_a_retry_does_not_count_as_progress(tmp_path: Path) -> None:
    """The copying process gives up after some time without progress, also if each request times out before that."""
    store = Store(f"file://{tmp_path}/mine", pauses_s=(0.01,))
    put(store, save(tmp_path / "run", 1))
    before = store.moved
    (tmp_path / "mine" / "checkpoints" / "step_00000001" / MANIFEST).unlink()
    (tmp_path / "mine" / "checkpoints" / "step_00000001" / MANIFEST).mkdir()  # cannot be read
    with pytest.raises(StoreError):
        store.manifest("step_00000001")
    assert store.moved == before


def test_retried_errors_of_a_store_are_printed(tmp_path: Path) -> None:
    said: list[str] = []
    answers = iter((TimeoutError("too slow"), 7))

    def answer() -> int:
        if isinstance(one := next(answers), Exception):
            raise one
        return one

    store = Store(f"file://{tmp_path}/mine", pauses_s=(0.01,), say=said.append)
    assert store._tried("cannot be read", answer) == 7
    assert said == [f"{store.url}: cannot be read: too slow; trying again in 0.01 s"]


@pytest.mark.parametrize(("fault", "code"), [(503, EXIT_CRASHED), (403, EXIT_USER_ERROR)])
def test_an_incomplete_copy_does_not_count(
    on_s3: Store, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, code: int
) -> None:
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    old = save(tmp_path / "run", 3)
    put(on_s3, old)
    path = save(tmp_path / "run", 4)
    s3.fault = lambda request: fault if request.startswith("PUT") and "exp_avg" in request else None
    with pytest.raises(StoreError, match="s3://bucket/copies/mine/checkpoints: cannot be written: ") as caught:
        put(on_s3, path)
    assert caught.value.exit_code == code
    assert on_s3.names() == [old.name, path.name]
    assert on_s3.manifest(path.name) is None
    assert "has no manifest.json" in on_s3.problems_of(path.name)[0]
    assert on_s3.problems_of(old.name) == []
    s3.fault = lambda request: None
    on_s3.prune(RetentionPolicy(1), {})  # an incomplete copy does not count, and is removed
    assert on_s3.names() == [old.name]


def test_another_checkpoint_of_the_same_step_replaces_a_copy(on_s3: Store, s3: S3Server, tmp_path: Path) -> None:
    put(on_s3, save(tmp_path / "run", 3))
    shutil.rmtree(tmp_path / "run")
    again = save(tmp_path / "run", 3, keep=RetentionPolicy(7))
    manifest = json.loads((again / MANIFEST).read_text())
    (again / MANIFEST).write_text(json.dumps(manifest))  # equal content, but different bytes
    s3.requests.clear()
    put(on_s3, again)
    changes = [request for request in s3.requests if request.startswith(("PUT", "DELETE"))]
    assert changes[0].startswith("DELETE")
    assert changes[0].endswith(MANIFEST)
    assert changes[-1].startswith("PUT")
    assert changes[-1].endswith(MANIFEST)
    assert on_s3.problems_of(again.name) == []


def test_a_large_file_is_sent_in_parts(
    on_s3: Store, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bfsys.checkpoint.store.BLOCK_BYTES", 5 << 20)  # the smallest part that S3 allows
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(os.urandom(12 << 20))
    path = save(run, 3)
    put(on_s3, path)
    assert sum(request.startswith("PUT") and request.endswith("metrics.jsonl") for request in s3.requests) == 3
    assert content(fetched(on_s3, path.name, tmp_path / "other")) == content(path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_copy_is_found(on_s3: Store, s3: S3Server, tmp_path: Path, damage: str) -> None:
    path = save(tmp_path / "run", 3)
    put(on_s3, path)
    key = f"copies/mine/checkpoints/{path.name}/{MANIFEST if damage == 'manifest' else 'weight-0-of-1.safetensors'}"
    was = s3.read(key)
    if damage == "missing":
        s3.client.delete_object(Bucket="bucket", Key=key)
    else:
        s3.write(key, was[:-1] if damage == "truncated" else was[:90] + bytes([was[90] ^ 1]) + was[91:])
    (problem,) = on_s3.problems_of(path.name)
    assert key.removeprefix("copies/mine") in problem
    assert ("is missing" if damage == "missing" else "checksum mismatch") in problem


def test_a_file_that_was_damaged_on_the_disk_is_not_copied(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3)
    weights = path / "weight-0-of-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    store = Store(f"file://{tmp_path}/copies/mine")
    with pytest.raises(UserError, match=r"weight-0-of-1.safetensors: checksum mismatch, .* it is not copied"):
        put(store, path)
    assert store.manifest(path.name) is None


def test_a_manifest_that_names_files_elsewhere_is_damaged(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/copies/mine")
    (tmp_path / "work").mkdir()
    problems = store.fetch("step_00000003", {"files": {"../../x": {"bytes": 1, "sha256": ""}}}, tmp_path / "work")
    assert "names '../../x'" in problems[0]


def test_the_newest_is_copied_first_and_stays_on_the_disk_until_then(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step)
    copies = Copies(run, f"file://{tmp_path}/copies/mine", RetentionPolicy(2))
    copies.offer()
    assert copies.copying
    assert copies.copying.name == "step_00000003"
    saver = saving.Saver(run, ALONE, RetentionPolicy(1), in_use=lambda: copies.copying)
    saver.start(Tensors(4), {"step": 4, "updates": 4, **FACTS})
    saver.finish()
    assert [path.name for path in all_checkpoints(run)] == ["step_00000003", "step_00000004"]
    copies.offer()
    news = []
    while copies.copying:
        news += filter(None, [copies.attend()])
        time.sleep(0.01)
    assert news == [f"checkpoints are copied to file://{tmp_path}/copies/mine"]
    assert copies.problem_of_newest() == ""
    assert Store(f"file://{tmp_path}/copies/mine").names() == ["step_00000003", "step_00000004"]
    saver.prune()  # as at the end of the run
    saver.close()
    assert [path.name for path in all_checkpoints(run)] == ["step_00000004"]


def test_a_checkpoint_holds_the_files_that_later_steps_depend_on(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    for name in HISTORY:
        (run / name).write_text(f"some of {name}")
    saver = saving.Saver(run, ALONE, RetentionPolicy(1), history=HISTORY)
    saver.start(Tensors(3), {"step": 3, "updates": 3, **FACTS})
    path = saver.finish()
    saver.close()
    store = Store(f"file://{tmp_path}/copies/mine")
    put(store, path)
    other.mkdir()
    (other / "quarantine.tsv").write_text("some of quarantine.tsv and more")
    (other / "rollbacks.json").write_text("less")
    fetched(store, path.name, other)
    assert (other / "quarantine.tsv").read_text() == "some of quarantine.tsv and more"
    assert (other / "rollbacks.json").read_text() == "some of rollbacks.json"
    assert (other / "metrics.jsonl").read_text() == "some of metrics.jsonl"


def test_failing_copies_are_reported_once(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "copies"
    place.mkdir(mode=0o500)
    if os.access(place, os.W_OK):  # root may write everywhere
        place.rmdir()
        place.write_text("in the way")
    copies = Copies(run, f"file://{place}/mine", RetentionPolicy(2))
    monitored = []
    for step in (1, 2):
        save(run, step)
        copies.offer()
        while copies.copying:
            monitored += filter(None, [copies.attend()])
            time.sleep(0.01)
    (news,) = monitored
    assert "step_00000001 is not copied: " in news
    assert "the next save tries again" in news
    assert "step_00000002: is intact, but has no copy in file://" in copies.problem_of_newest()


def test_a_copying_process_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    copies = Copies(tmp_path / "run", f"file://{tmp_path}/mine", RetentionPolicy(2))
    monkeypatch.setattr("bfsys.checkpoint.copies.start_child", fail)
    save(tmp_path / "run", 1)
    copies.offer()
    assert copies.attend() == (
        "step_00000001 is not copied: the copying process cannot be started: Resource temporarily unavailable; "
        "training continues, and the next save tries again"
    )
    copies.offer()
    assert copies.attend() == ""  # it is reported only once
    monkeypatch.undo()
    copies.offer()
    while copies.copying:
        news = copies.attend()
        time.sleep(0.01)
    assert news.endswith("/mine/checkpoints again") or news.endswith("/mine again")


def test_errors_of_the_disk_are_not_errors_of_the_store(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/mine")
    put(store, save(tmp_path / "run", 1))
    (name,) = store.names()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.fetch(name, store.manifest_or_error(name), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.put(tmp_path / "nowhere", {})


def test_a_full_disk_is_named_when_a_copy_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # errors of an open file have no name

    put(Store(f"file://{tmp_path}/mine"), save(tmp_path / "run", 1))
    monkeypatch.setattr(os, "fsync", is_full)
    with pytest.raises(OSError, match="No space left on device") as error:
        call("checkpoint", ["copy", f"file://{tmp_path}/mine", str(tmp_path / "other")])
    assert str(error.value.filename).startswith(f"{tmp_path}/other/checkpoints/")


def test_an_unreachable_file_server_does_not_count_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "run", 1)
    task = {"action": "copy", "url": f"file://{tmp_path}/mine", "path": str(path), "run_dir": str(tmp_path / "run"),
            "keep": KEEP}  # fmt: skip

    def fail(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("bfsys.checkpoint.files.PAUSES_S", ())
    monkeypatch.setattr("bfsys.checkpoint.files.read_regular", fail)
    answer = copier.outcome(task)
    assert "damaged" not in answer
    assert answer["exit_code"] == EXIT_CRASHED
    monkeypatch.undo()
    (path / MANIFEST).write_text("{}")
    assert "checksum mismatch" in copier.outcome(task)["damaged"]


def test_a_copy_that_fails_after_a_save_is_followed_by_that_of_the_newest(tmp_path: Path, monkeypatch) -> None:
    run, place = tmp_path / "run", tmp_path / "copies"
    place.write_text("in the way")
    copies = Copies(run, f"file://{place}/mine", RetentionPolicy(2))
    save(run, 1)
    copies.offer()
    save(run, 2)
    copies.offer()  # the last checkpoint: no later offer retries it
    assert copies.copying
    assert copies.copying.name == "step_00000001"
    monkeypatch.setattr("bfsys.checkpoint.copies.start_child", lambda *task: place.unlink() or start_child(*task))
    while copies.copying:
        copies.attend()
        time.sleep(0.01)
    assert not place.is_file()  # it was there when the first copy was tried
    assert copies.problem_of_newest() == ""


def test_a_copying_process_that_somebody_has_stopped_continues(tmp_path: Path, monkeypatch) -> None:
    def start_stopped(*task) -> subprocess.Popen:
        process = start_child(*task)
        process.send_signal(signal.SIGSTOP)
        return process

    monkeypatch.setattr("bfsys.checkpoint.copies.start_child", start_stopped)
    copies = Copies(tmp_path / "run", f"file://{tmp_path}/copies/mine", RetentionPolicy(2))
    save(tmp_path / "run", 1)
    copies.offer()
    last = time.monotonic() + 60
    while copies.copying and time.monotonic() < last:
        copies.attend()
        time.sleep(0.01)
    copies.close()
    assert copies.problem_of_newest() == ""


def test_a_run_does_not_start_over_if_all_copies_are_damaged(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/copies/mine")
    for step in (1, 2):
        put(store, save(tmp_path / "run", step))
        weights = tmp_path / "copies" / "mine" / "checkpoints" / f"step_{step:08d}" / "weight-0-of-1.safetensors"
        weights.write_bytes(b"")
    task = {"run_dir": str(tmp_path / "other"), "after": -1, "until": None}
    for _ in range(2):  # the same command is repeated
        answer = copier.fetch(store, task)
        assert "work" not in answer
        assert len(answer["skipped"]) == 2
    copier.fetch(store, {**task, "after": 1})  # the disk has step 1, so the run resumes and copies step 2 again
    assert [store.has_manifest(name) for name in store.names()] == [True, False]


def test_a_renamed_copy_does_not_hide_older_ones(tmp_path: Path) -> None:
    store, run = Store(f"file://{tmp_path}/copies/mine"), tmp_path / "other"
    for step in (1, 2):
        put(store, save(tmp_path / "run", step))
    root = tmp_path / "copies" / "mine" / "checkpoints"
    shutil.copytree(root / "step_00000001", root / "step_00000100")
    save(run, 1)
    fetched = fetch_newest(Wanted(run, f"file://{tmp_path}/copies/mine", after=1), ALONE, check=lambda work: None)
    assert (fetched.name, fetched.problem) == ("step_00000002", "")
    assert fetched.notes[0].startswith("skipped a copy: ")
    assert "step_00000100: holds the checkpoint of step 1, so it was renamed" in fetched.notes[0]
    with pytest.raises(UserError, match="so it was renamed"):  # a run without any checkpoint
        copier.fetch(store, {"run_dir": str(tmp_path / "new"), "after": -1, "until": None})


def test_a_copy_that_has_lost_a_file_is_repaired(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    url, run = f"file://{tmp_path}/copies/mine", tmp_path / "run"
    store = Store(url)
    path = save(run, 4)
    put(store, path)
    weights = tmp_path / "copies" / "mine" / "checkpoints" / path.name / "weight-0-of-1.safetensors"
    weights.unlink()
    put(store, path)
    assert store.problems_of(path.name) == []
    weights.write_bytes(weights.read_bytes()[::-1])  # of the same size
    call("checkpoint", ["copy", str(run), url])
    assert store.problems_of(path.name) == []


def test_a_copy_is_named_by_its_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    url = f"file://{tmp_path}/copies/mine"
    best = save(tmp_path / "run", 4).rename(tmp_path / "best")
    call("checkpoint", ["copy", str(best), url])
    assert Store(url).names() == ["step_00000004"]
    assert f"copied {best} to {url}/checkpoints/step_00000004" in capsys.readouterr().out


def test_a_folder_for_copies_must_exist(tmp_path: Path) -> None:
    """Otherwise the copies of a run whose disk is not mounted look like none, and the run starts over."""
    with pytest.raises(StoreError, match=f"{tmp_path}/nas: there is no such folder; make it, or mount the disk"):
        Store(f"file://{tmp_path}/nas/mine").probe()
    (tmp_path / "nas").mkdir()
    Store(f"file://{tmp_path}/nas/mine").probe()


def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"file://{tmp_path}/copies/mine", pauses_s=())
    put(store, save(tmp_path / "run", 1))

    def refuse(*_: object) -> None:
        raise StoreError("403")

    monkeypatch.setattr(store, "fetch", refuse)
    with pytest.raises(StoreError):
        copier.fetch(store, {"run_dir": str(tmp_path / "other"), "after": -1, "until": None})
    assert list((tmp_path / "other" / "checkpoints").iterdir()) == []


def test_an_answer_with_many_problems_fits_into_the_pipe(tmp_path: Path) -> None:
    final = tmp_path / "copies" / "mine" / "checkpoints" / "step_00000005"
    work = final.with_name(".work")
    work.mkdir(parents=True)
    names = {f"weight-{i}-of-2000.safetensors": {"bytes": 9, "sha256": "0" * 64} for i in range(2000)}
    commit(work, final, {**FACTS, "step": 5, "updates": 5}, names)
    wanted = Wanted(tmp_path / "run", f"file://{tmp_path}/copies/mine", after=-1)
    fetched = fetch_newest(wanted, ALONE, check=lambda path: None)
    assert fetched.name is None
    assert len(fetched.notes) == copier.MOST_PROBLEMS + 1
    assert fetched.notes[-1] == "skipped a damaged copy: and 1,980 more damaged files"
