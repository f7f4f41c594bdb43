"""`bfsys checkpoint`, also on copies in a store and on checkpoints that this version does not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bfsys.checkpoint import files
from bfsys.checkpoint.store import Store
from bfsys.cli import call
from bfsys.errors import UserError
from tests.checkpoint.test_checkpoint import save
from tests.checkpoint.test_store import put
from tests.conftest import closed_output
from tests.s3_server import S3Server


def write_in_other_format(path: Path) -> None:
    manifest = files.read_manifest(path) | {"format": 3}
    manifest["sha256"] = files.fingerprint(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("is_in_store", [False, True])
def test_checkpoints_of_another_format_hide_no_others(
    is_in_store: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [save(tmp_path / "run", step) for step in (1, 2, 3)]
    run, folder = str(tmp_path / "run"), tmp_path / "run"
    if is_in_store:
        run, folder = f"file://{tmp_path}/copies", tmp_path / "copies"
        for path in paths:
            put(Store(run), path)
    write_in_other_format(folder / "checkpoints" / "step_00000002")
    capsys.readouterr()
    assert call("checkpoint", ["list", run]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[1:]
    assert "step_00000002: has format 3, and this version of bfsys reads 2" in second
    assert second.startswith("         2  not read: ")
    assert (first.split()[0], third.split()[0]) == ("1", "3")
    assert call("checkpoint", ["verify", run]) == 2
    verified = capsys.readouterr().out
    assert verified.count(": intact") == 2
    assert "not verified: " in verified
    weights = folder / "checkpoints" / "step_00000003" / "weight-0-of-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert call("checkpoint", ["verify", run]) == 1


def test_damage_is_found_if_the_reader_of_the_output_has_ended(tmp_path: Path) -> None:
    _, newest = [save(tmp_path / "run", step) for step in (1, 2)]
    (newest / "weight-0-of-1.safetensors").write_bytes(b"")
    with closed_output():
        assert call("checkpoint", ["verify", str(tmp_path / "run")]) == 1


def test_the_command_reads_copies_and_moves_them(s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 3, "top1": 0.5, "loss": 1.0}\n')
    for step in (3, 4):
        save(tmp_path / "run", step)
    url = "s3://bucket/elsewhere/mine"
    for name in ("step_00000003", "step_00000004"):
        assert call("checkpoint", ["copy", str(tmp_path / "run" / "checkpoints" / name), url]) == 0
    capsys.readouterr()
    assert call("checkpoint", ["list", url]) == 0
    _, third, fourth = capsys.readouterr().out.splitlines()
    assert third.split()[0] == "3"
    assert "top-1 50.00 %" in third
    assert fourth.split()[0] == "4"
    assert call("checkpoint", ["verify", url]) == 0
    assert call("checkpoint", ["show", f"{url}/checkpoints/step_00000003"]) == 0
    assert "step      3" in capsys.readouterr().out
    s3.write("elsewhere/mine/checkpoints/step_00000004/weight-0-of-1.safetensors", b"")
    assert call("checkpoint", ["verify", url]) == 1
    assert call("checkpoint", ["copy", url, str(tmp_path / "other")]) == 0
    assert "skipped a damaged copy: s3://bucket/elsewhere/mine/" in capsys.readouterr().err
    assert files.problems_of(tmp_path / "other" / "checkpoints" / "step_00000003") == []
    assert not list((tmp_path / "other" / "checkpoints").glob(".*"))
    assert "top1" in (tmp_path / "other" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["list", "s3://bucket/none"],
            "s3://bucket/none: holds no checkpoint, or its bucket does not",
        ),
        (["prune", "s3://bucket/none"], "prune takes a run directory"),
        (["copy", "s3://bucket/none"], "copy: needs RUN and TO"),
        (["list", "s3://bucket/none", "x"], "list: takes no TO, got x"),
        (["copy", "s3://bucket/none", "s3:/bucket/x"], "two slashes follow the colon in a URL: s3://bucket/x"),
        (["copy", "a", "b"], "one of RUN and TO must be a URL"),
        (["copy", "s3://a/b", "s3://c/d"], "first copy to a folder"),
        (["verify", "s3://key:secret@bucket/x"], "holds a password"),
    ],
)
def test_the_command_rejects_wrong_locations(s3: S3Server, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call("checkpoint", arguments)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket/copies/mine", "bfsys checkpoint copy s3://bucket/copies/mine mine"),
        ("file:///no/my run", "bfsys checkpoint copy 'file:///no/my run' 'my run'"),
    ],
)
def test_commands_that_read_a_run_name_the_command_that_fetches_it(command: str, url: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        call(command, [url])
