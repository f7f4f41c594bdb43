"""The list of bad samples in a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from bfsys.data.streaming.quarantine import FILE, BadSample, Quarantine
from bfsys.dist import AgreedError
from bfsys.errors import UserError
from tests.data.streaming.test_damage import ALONE


def test_the_file_survives_a_torn_line(tmp_path: Path) -> None:
    row = BadSample(3, "train", "a", 7, "a.tar", "k\u2028ey\r", "is\tempty\n")
    quarantine = Quarantine(tmp_path)
    quarantine.found([row])
    quarantine.share(ALONE, {("train", "a"): 100}, 1)
    path = tmp_path / FILE
    path.write_text(path.read_text() + "x\n9\ttrain\n9\ttrain\ta\t8\ta.t")
    again = Quarantine.load(tmp_path, ALONE)
    assert again.bad_from("train", "a") == {7: 3}
    again.found([row._replace(step=5), row._replace(sample=8, step=9)])  # the first is known from an earlier step
    assert [r.sample for r in again.share(ALONE, {("train", "a"): 100}, 1)] == [8]
    assert Quarantine.load(tmp_path, ALONE).bad_from("train", "a") == {7: 3, 8: 9}
    with pytest.raises(AgreedError, match="2 of 100 samples of train"):
        Quarantine.load(tmp_path, ALONE).check({("train", "a"): 100}, 0.01)


def test_samples_of_data_that_were_replaced_are_not_recorded(tmp_path: Path) -> None:
    """They look damaged, since the index is that of the earlier data."""

    def check_data() -> None:
        raise UserError("was packed again")

    quarantine = Quarantine.load(tmp_path, ALONE, check_data)
    quarantine.share(ALONE, {("train", "a"): 100}, 1)  # nothing was found
    quarantine.found([BadSample(3, "train", "a", 7, "a.tar", "key", "has a checksum mismatch")])
    with pytest.raises(AgreedError, match="was packed again"):
        quarantine.share(ALONE, {("train", "a"): 100}, 1)
    assert not (tmp_path / FILE).exists()
    assert quarantine.bad_from("train", "a") == {}


@pytest.mark.parametrize("damage", [b"\xff" * 300, b"junk\n", b"1\ttrain\ta\tx\ta.tar\tk\tr\n"])
def test_rows_that_cannot_be_read_are_named(damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.found([BadSample(3, "train", "a", 7, "a.tar", "key", "is empty")])
    quarantine.share(ALONE, {("train", "a"): 100}, 1)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + damage + (b"" if damage.endswith(b"\n") else b"\n"))
    assert Quarantine.load(tmp_path, ALONE).bad_from("train", "a") == {7: 3}
    assert "quarantine.tsv: ignored invalid rows (line 3)" in capsys.readouterr().err
    (tmp_path / FILE).write_bytes(damage)
    assert Quarantine.load(tmp_path, ALONE).bad_from("train", "a") == {}
    assert "(line 1)" in capsys.readouterr().err
