"""The content of metrics.jsonl and of TensorBoard's files after a resume (runs on real ranks: test_resume.py)."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from bfsys.checkpoint.files import METRICS
from bfsys.config import load_config
from bfsys.errors import EXIT_CRASHED, EXIT_STORAGE
from bfsys.json_lines import read_json_lines
from bfsys.ranks import Ranks
from bfsys.supervision.goodput import Ledger
from bfsys.supervision.metrics import LINE, Metrics, _blocks_of, _open_lines, _rate


@pytest.fixture
def metrics(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    """The metrics of a new run."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restore it after Metrics replaces it
    config = load_config(config_file, [])
    config.run_dir.mkdir(parents=True)
    ledger = Ledger(config.run_dir, is_rank_zero=True)
    metrics = Metrics(config, Ranks(), ("a", "b"), 5, ledger=ledger, first_step=0)
    yield metrics
    metrics.close()
    ledger.close()


def test_metrics_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n{"kind": "train", "step": 2}\n'
    path.write_text(kept + '{"kind": "train", "step": 3}\n{"ste')
    file, latest = _open_lines(path, 2, ())
    file.close()
    assert path.read_text() == kept
    assert latest["step"] == 1


def test_lines_of_bad_steps_that_are_skipped_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"kind": "{kind}", "step": {step}}}\n' for step in range(4) for kind in ("bad_step", "train")]
    path.write_text("".join(lines))
    _open_lines(path, 1, {3})[0].close()
    assert path.read_text() == "".join([*lines[:4], lines[6]])


@pytest.mark.parametrize("change", ["deleted", "replaced", "overwritten"])
def test_lines_of_a_deleted_or_changed_file_are_written_again(
    metrics: Metrics, capsys: pytest.CaptureFixture, change: str
) -> None:
    """An editor replaces or overwrites a file that it saves. The scores decide which checkpoints are kept."""
    path = metrics.run_dir / METRICS
    metrics.restore_lines()
    metrics.event("bad_step", 1, {})
    if change != "overwritten":
        path.unlink()
    if change != "deleted":
        path.write_text("other\n")
    metrics.event("bad_step", 2, {})
    metrics.restore_lines()
    metrics.event("bad_step", 3, {})
    metrics.restore_lines()
    assert [line["step"] for line in read_json_lines(path, LINE)] == [1, 2, 3]
    assert capsys.readouterr().out.count("lines are written again") == 1


def test_a_kill_before_tensorboard_shows_an_evaluation_leaves_no_line_of_it(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume then evaluates again, so the evaluation is not missing in TensorBoard."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    scores = {"loss": 1.0, "top1": 0.5, "top5": 1.0}
    result = {**scores, "sources": {"a": scores, "b": scores}}
    with monkeypatch.context() as patch:
        patch.setattr("bfsys.supervision.metrics.show_line", kill)
        with pytest.raises(KeyboardInterrupt):
            metrics.evaluation(1, result, 1.0, "some files")
    assert list(read_json_lines(metrics.run_dir / METRICS, LINE)) == []
    metrics.evaluation(1, result, 1.0, "some files")
    assert [line["step"] for line in read_json_lines(metrics.run_dir / METRICS, LINE)] == [1]


def test_a_deleted_tensorboard_folder_is_named_and_the_run_may_be_restarted(metrics: Metrics) -> None:
    shutil.rmtree(metrics.run_dir / "tb")
    scores = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "samples": 4}
    metrics.evaluation(1, {**scores, "sources": {"a": scores, "b": scores}}, 1.0, "some files")
    assert metrics.problem == f"{metrics.run_dir}: tb was deleted while this run trains; the next start makes it again"
    assert metrics.problem_code == EXIT_CRASHED


def test_tensorboard_compares_runs_by_hyperparameters_and_scores(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is one session with the scores of its latest evaluation, also after a resume."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restore it after Metrics replaces it
    for name, rate, evaluations in (("one", 0.5, {0: 0.1, 4: 0.25, 8: 0.75}), ("two", 0.125, {0: 0.5})):
        config = load_config(config_file, [f"name={name}", f"optim.lr={rate}"])
        config.run_dir.mkdir(parents=True)
        for first_step, top1 in evaluations.items():  # each start of a run is evaluated one step later
            ledger = Ledger(config.run_dir, is_rank_zero=True)
            metrics = Metrics(config, Ranks(), ("a", "b"), 5, ledger=ledger, first_step=first_step)
            scores = {"loss": 1 - top1, "top1": top1, "top5": 1.0, "samples": 4}
            metrics.evaluation(first_step + 1, {**scores, "sources": {"a": scores, "b": scores}}, 1.0, "some files")
            metrics.close()
            ledger.close()
    assert sessions(tmp_path / "runs") == {
        "one/tb": (0.5, {"accuracy/val": 0.75, "loss/val": 0.25}),
        "two/tb": (0.125, {"accuracy/val": 0.5, "loss/val": 0.5}),
    }


def sessions(folder: Path) -> dict[str, tuple[float, dict[str, float]]]:
    """The rows of the HParams tab: (learning rate, scores) by session."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(TBContext(logdir=str(folder), multiplexer=multiplexer, data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS], aggregation_type=api_pb2.AGGREGATION_AVG,
        include_metrics=True,
    )  # fmt: skip
    answer = Handler(RequestContext(), context, "", request).run()
    found = [session for group in answer.session_groups for session in group.sessions]
    assert len(found) == len(answer.session_groups), "sessions of equal hyperparameters"
    return {
        group.sessions[0].name: (
            group.hparams["optim.lr"].number_value,
            {value.name.tag: value.value for value in group.metric_values},
        )
        for group in answer.session_groups
    }


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EMFILE, "raise the limit of open files"), (errno.ENOSPC, "free disk space"), (errno.EROFS, "repair that")],
)
def test_metrics_that_cannot_be_written_are_reported_with_a_remedy(number: int, remedy: str, metrics: Metrics) -> None:
    with metrics._noting_problems():
        raise OSError(number, os.strerror(number))
    assert metrics.problem.startswith(f"{metrics.run_dir}: metrics cannot be written: {os.strerror(number)}; {remedy}")
    assert metrics.problem_code == EXIT_STORAGE


def test_lengths_are_read_in_blocks() -> None:
    assert _blocks_of(np.arange(7), 1000).tolist() == list(range(7))
    some = _blocks_of(np.arange(1_000_000), 10_000)
    assert len(some) == 10_000
    assert (some[0], some[-1]) == (0, 999_999)
    assert np.count_nonzero(np.diff(some) > 1) == 99  # between 100 blocks


def test_the_rate_of_small_files_is_not_zero() -> None:
    assert [_rate(b) for b in (820_000.0, 99_000.0, 3_000.0)] == ["0.82 MB/s", "99.00 kB/s", "3.00 kB/s"]
