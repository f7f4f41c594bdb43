"""Nine kinds of damage: how training handles each, and where it is reported."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from bfsys.checkpoint.files import read_manifest
from bfsys.cli import call
from bfsys.commands.inspect import verify
from bfsys.config import Config, load_config
from bfsys.data.storage.description import DESCRIPTION
from bfsys.data.storage.shards import Split, open_split
from bfsys.data.streaming import shard_files
from bfsys.data.streaming.datasets import make_plan, open_evaluation, open_training
from bfsys.data.streaming.loader import evaluation_rounds, training_batches
from bfsys.data.streaming.quarantine import FILE, BadSample, Quarantine
from bfsys.data.streaming.run_data import open_run_data
from bfsys.dist import AgreedError, Ranks
from bfsys.errors import UserError
from bfsys.evaluate import evaluate
from tests.conftest import _run_ranks, tiny_config
from tests.test_train import assert_success, cut_short, lines, newest, tensors

DAMAGED = 5  # number of the damaged sample
ALONE = Ranks()


@pytest.fixture
def dataset(datasets: Path, tmp_path: Path) -> Path:
    return shutil.copytree(datasets / "a", tmp_path / "a")


@pytest.fixture
def config(dataset: Path, datasets: Path, tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path, datasets, dataset), ["train.steps=60"])


def write_config(folder: Path, datasets: Path, dataset: Path, name: str = "tiny") -> Path:
    tree = tiny_config(datasets, folder)
    tree["data"]["sources"][0]["path"] = str(dataset)
    tree["data"]["max_bad_share"] = 0.5
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def place(split: Split) -> tuple[Path, int, int]:
    """(tar, first byte, length) of the damaged sample."""
    row = split.samples[DAMAGED]
    return split.path / split.shards[row["shard"]].file, int(row["offset"]), int(row["length"])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def truncate(dataset: Path) -> None:
    tar, start, _ = place(open_split(dataset, "train"))
    tar.write_bytes(tar.read_bytes()[:start])


def flip_payload(dataset: Path) -> None:
    tar, start, length = place(open_split(dataset, "train"))
    flip(tar, start + length // 2)


def flip_header(dataset: Path) -> None:
    tar, start, _ = place(open_split(dataset, "train"))
    flip(tar, start - 512)  # the first letter of its name


def remove_member(dataset: Path) -> None:
    tar, start, _ = place(open_split(dataset, "train"))
    content = BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=content, mode="w") as new:
        for info in old:
            if info.offset_data != start:
                new.addfile(info, old.extractfile(info))
    tar.write_bytes(content.getvalue())


def remove_shard(dataset: Path) -> None:
    place(open_split(dataset, "train"))[0].unlink()


def relabel_in_tar(dataset: Path) -> None:
    split = open_split(dataset, "train")
    tar, start, length = place(split)
    at = start + length + -length % 512 + 512
    assert tar.read_bytes()[at : at + 1] == b"%d" % split.samples[DAMAGED]["label"]
    flip(tar, at)


def relabel_in_index(dataset: Path) -> None:
    file = dataset / "a-train.samples.npy"
    samples = np.load(file)
    samples["label"][DAMAGED] ^= 1
    np.save(file, samples)


def take_other_index(dataset: Path) -> None:
    """Replace the index by that of another dataset with the same number of samples."""
    split = open_split(dataset, "train")
    order = np.random.default_rng(0).permutation(len(split))
    samples = np.load(dataset / "a-train.samples.npy")
    for field in ("offset", "length", "checksum", "label"):
        samples[field] = samples[field][order]
    np.save(dataset / "a-train.samples.npy", samples)


# Damage that training finds when it reads, and the message of --verify.
READ: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated tar": (truncate, "bytes early", "lie past its end"),
    "flipped byte in payload": (flip_payload, "checksum", "its bytes differ from the checksum"),
    "missing member": (remove_member, "checksum", "has no payload"),
    "vanished shard": (remove_shard, "its shard is missing", "the shard is missing"),
}
# Damage that training does not read, so that it does no harm.
UNREAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte in header": (flip_header, "bad checksum"),
    "wrong label in the tar": (relabel_in_tar, "class"),
}
# Damage that is refused before the first step.
REFUSED: dict[str, Callable[[Path], None]] = {
    "wrong label in the index": relabel_in_index,
    "index of other shards": take_other_index,
}


def drawn(config: Config, ranks: Ranks = ALONE, first_step: int = 0, known: Quarantine | None = None):
    """(step, source, sample, label, bytes) of all samples of a rank, and its bad samples."""
    sources = open_training(config)
    plan = make_plan(config, sources)
    quarantine = known or Quarantine()
    batches = training_batches(config, sources, plan, ranks, first_step=first_step, quarantine=quarantine)
    got = []
    for number, batch in enumerate(batches):
        step = first_step + number // (plan.lanes // ranks.world_size)
        for i, (source, sample) in enumerate(zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)):
            content = batch.data[batch.offsets[i] : batch.offsets[i + 1]].numpy().tobytes()
            got.append((step, source, sample, int(batch.labels[i]), content))
    return got, quarantine.share(ALONE, sources.sizes, config.data.max_bad_share)


@pytest.mark.parametrize("kind", READ)
def test_a_bad_sample_is_named_and_replaced_alike_on_every_rank_and_replay(
    kind: str, config: Config, dataset: Path
) -> None:
    damage, reason, verified = READ[kind]
    whole, _ = drawn(config)
    files = {sample: rest for _, source, sample, *rest in map(list, whole) if source == 0}
    damage(dataset)
    got, bad = drawn(config)
    split = open_split(dataset, "train")
    assert {row.key for row in bad} >= {split.key(DAMAGED)}
    assert all(reason in row.reason for row in bad)
    assert all(row.shard == place(split)[0].name for row in bad)
    first_met = {row.sample: row.step for row in bad}

    # Good samples are unchanged, and bad ones are replaced by other samples of their source, which are intact.
    assert len(got) == len(whole)
    replaced = 0
    for before, now in zip(whole, got, strict=True):
        if before[1] == 0 and before[2] in first_met:
            replaced += 1
            assert now[1] == 0
            assert now[2] not in first_met
            assert list(now[3:]) == files[now[2]]
        else:
            assert now == before
    assert replaced >= 1

    # Other ranks, other workers, a replay from the middle and a replay with the quarantine choose the same samples.
    assert sorted(drawn(config, Ranks(0, 2))[0] + drawn(config, Ranks(1, 2))[0]) == sorted(got)
    with_workers = load_config(dataset.parent / "tiny.yaml", ["train.steps=60", "data.workers=2"])
    assert drawn(with_workers)[0] == got
    assert drawn(config, first_step=30)[0] == [row for row in got if row[0] >= 30]
    known = Quarantine()
    known.found(bad)
    known.share(ALONE, {("train", "a"): len(split)}, 1)
    assert drawn(config, known=known)[0] == got

    assert any(verified in problem for problem in verify(split))


def test_a_sample_is_bad_from_the_step_that_found_it(config: Config, dataset: Path) -> None:
    """A replay of earlier steps, in which it was good, reads it again. Later steps replace it, even if repaired."""
    whole, _ = drawn(config)
    steps = [step for step, source, sample, *_ in whole if (source, sample) == (0, DAMAGED)]
    assert len(steps) > 1
    known = Quarantine()
    known.found([BadSample(steps[1], "train", "a", DAMAGED, "x.tar", "key", "was damaged then")])
    known.share(ALONE, {("train", "a"): 120}, 1)
    got, _ = drawn(config, known=known)
    changed = [now[0] for before, now in zip(whole, got, strict=True) if before != now]
    assert changed == steps[1:]


def test_a_list_of_a_folder_with_blanks_in_its_name_is_applied_again(datasets: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(datasets / "a", tmp_path / "my  two\tblanks ")
    sources = open_training(load_config(write_config(tmp_path, datasets, dataset)))
    origin = sources.opened[0].origin
    quarantine = Quarantine(tmp_path)
    quarantine.found([BadSample(3, "train", origin, DAMAGED, "a.tar", "key", "is\tempty")])
    quarantine.share(ALONE, sources.sizes, 1)
    assert Quarantine.load(tmp_path, ALONE).bad_from("train", origin) == {DAMAGED: 3}


@pytest.mark.parametrize("kind", UNREAD)
def test_verify_names_damage_that_does_not_affect_training(
    kind: str, config: Config, dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    damage, verified = UNREAD[kind]
    whole, _ = drawn(config)
    damage(dataset)
    assert drawn(config) == (whole, [])
    assert call("inspect", [str(dataset), "--verify"]) == 1
    assert verified in capsys.readouterr().err


@pytest.mark.parametrize("kind", REFUSED)
def test_an_index_that_is_not_the_packed_one_is_refused(kind: str, config: Config, dataset: Path) -> None:
    REFUSED[kind](dataset)
    with pytest.raises(
        UserError, match=r"the index of 'train' is damaged or belongs to other shards: .* first for a-train-0"
    ):
        open_run_data(config, ALONE)


def test_each_rank_proves_a_part_of_the_index(config: Config, dataset: Path) -> None:
    relabel_in_index(dataset)
    problems = 0
    for rank in range(4):
        try:
            open_run_data(config, Ranks(rank, 4))
        except UserError:
            problems += 1
    assert problems == 1


def foreign_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))


def test_an_empty_file_of_foreign_tars_is_left_out(tmp_path: Path, datasets: Path) -> None:
    """`bfsys pack` refuses empty files, but tars that were made elsewhere may contain them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    content = [b"" if i == DAMAGED else bytes([i]) * 9 for i in range(40)]
    members = [part for i, c in enumerate(content) for part in ((f"{i:03}.bin", c), (f"{i:03}.cls", b"%d" % (i % 2)))]
    foreign_tar(folder / "theirs-train-000000.tar", members)
    call("inspect", [str(folder), "--rebuild"])
    config = load_config(write_config(tmp_path, datasets, folder), ["train.steps=30"])
    got, bad = drawn(config)
    assert [(row.source, row.sample, row.reason) for row in bad] == [("theirs", DAMAGED, "is empty")]
    assert (0, DAMAGED) not in {(source, sample) for _, source, sample, *_ in got}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_key_that_comes_twice_is_refused(tmp_path: Path, shards: int) -> None:
    for number in range(shards):
        members = [("x.bin", b"1"), ("x.cls", b"0")] * (3 - shards)
        foreign_tar(tmp_path / f"t-train-{number:06}.tar", members)
    with pytest.raises(UserError, match="'x'"):
        call("inspect", [str(tmp_path), "--rebuild"])
    assert not (tmp_path / DESCRIPTION).exists()


def test_a_file_that_vanishes_in_mid_run_is_noticed(
    config: Config, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is missing only after its descriptor is closed; until then the system keeps the file."""
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 1)
    sources = open_training(config)
    quarantine = Quarantine()
    batches = training_batches(config, sources, make_plan(config, sources), ALONE, first_step=0, quarantine=quarantine)
    first = [next(batches) for _ in range(8)]
    remove_shard(dataset)
    rest = list(batches)
    bad = quarantine.share(ALONE, sources.sizes, 0.5)
    assert {row.reason for row in bad} == {"its shard is missing"}
    assert min(row.step for row in bad) >= 2
    assert len(first) + len(rest) == 60 * config.data.lanes
    assert sum(batch.replaced for batch in rest) >= len(bad)


def test_evaluation_leaves_bad_files_out_and_says_so(
    finished_run: Path, datasets: Path, tmp_path: Path, evaluate_run, capsys
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    dataset = shutil.copytree(datasets / "a", tmp_path / "a")
    split = open_split(dataset, "val")
    tar, start, _ = place(split)
    flip(tar, start)
    config = load_config(run / "config.yaml", [f"data.sources.0.path={dataset}", "data.max_bad_share=0.1"])
    sources = open_evaluation(config, "val", ("a0", "a1", "a2", "b0", "b1"))
    quarantine = Quarantine()
    rounds = list(evaluation_rounds(config, sources, ALONE, quarantine, 7))
    seen = [pair for batch, _ in rounds for pair in zip(batch.sources.tolist(), batch.samples.tolist(), strict=True)]
    assert len(seen) == len(set(seen)) == sum(map(len, sources.splits)) - 1
    assert (0, DAMAGED) not in seen
    (bad,) = quarantine.share(ALONE, sources.sizes, 0.1)
    assert (bad.step, bad.split, bad.source, bad.key) == (7, "val", "a", split.key(DAMAGED))


def test_a_run_on_damaged_data_continues_and_resumes_like_an_uninterrupted_one(
    dataset: Path, datasets: Path, tmp_path: Path
) -> None:
    truncate(dataset)
    config_file = write_config(tmp_path, datasets, dataset)
    change = "train.steps=12 train.save_every=5 train.eval_every=6 data.workers=1"
    runs = tmp_path / "runs"
    assert_success(_run_ranks(2, ["tests/worker.py", str(config_file), f"{change} name=whole"]))
    cut_short(runs / "whole", runs / "parts", step=5)
    assert_success(_run_ranks(2, ["tests/worker.py", str(config_file), f"{change} name=parts"]))
    rows = (runs / "whole" / FILE).read_text().splitlines()
    assert rows[0].split("\t") == list(BadSample._fields)
    assert len(rows) > 1
    assert sorted(rows) == sorted((runs / "parts" / FILE).read_text().splitlines())
    compared = ("loss", "top1", "bad_files", "replaced_samples", "samples", "sources")
    whole, parts = ([{k: line.get(k) for k in compared} for line in lines(runs / n)] for n in ("whole", "parts"))
    assert whole == parts
    assert whole[-1]["bad_files"] == len(rows) - 1
    assert sum(line["replaced_samples"] or 0 for line in whole) >= len(rows) - 1
    weights, again = (tensors(newest(runs / name), "weight") for name in ("whole", "parts"))
    assert all(torch.equal(weights[n], again[n]) for n in weights)


def test_too_much_damage_ends_the_run_with_the_list(dataset: Path, datasets: Path, tmp_path: Path) -> None:
    split = open_split(dataset, "train")
    for row in split.samples[::3]:
        flip(dataset / split.shards[row["shard"]].file, int(row["offset"]))
    config_file = write_config(tmp_path, datasets, dataset)
    results = _run_ranks(2, ["bfsys/train.py", str(config_file), "data.max_bad_share=0.01", "train.steps=200"])
    output = "".join(r.stderr for r in results)
    assert [r.returncode for r in results] == [2, 2]
    assert "more than data.max_bad_share 0.01 allows" in output
    rows = (tmp_path / "runs" / "tiny" / FILE).read_text().splitlines()[1:]
    assert len(rows) >= 2
    for row in rows[:2]:
        assert f"sample {row.split(chr(9))[5]!r}" in output
    assert "Traceback" not in output


def test_a_lost_dataset_ends_the_run_with_what_was_found(dataset: Path, datasets: Path, tmp_path: Path) -> None:
    for tar in dataset.glob("a-train-*.tar"):
        tar.unlink()
    config_file = write_config(tmp_path, datasets, dataset)
    (result,) = _run_ranks(1, ["bfsys/train.py", str(config_file)])
    assert result.returncode == 2
    assert "replacement candidates can be read" in result.stderr
    assert re.search("sample .* its shard is missing", result.stderr)
    assert json.loads((tmp_path / "runs" / "tiny" / "ended.json").read_text())["exit_code"] == 2


def test_a_checkpoint_saved_before_a_failing_evaluation_counts(
    dataset: Path, datasets: Path, tmp_path: Path, run_ranks
) -> None:
    for tar in dataset.glob("a-val-*.tar"):
        tar.unlink()
    config_file = write_config(tmp_path, datasets, dataset)
    change = ["train.steps=9", "train.save_every=4", "train.eval_every=4"]
    results = run_ranks(2, ["bfsys/train.py", str(config_file), *change])
    assert [r.returncode for r in results] == [2, 2], results[0].stderr
    assert "of val are unreadable" in results[0].stderr
    assert read_manifest(newest(tmp_path / "runs" / "tiny"))["step"] == 4


def test_an_evaluation_of_nothing_is_an_error_with_the_list(dataset: Path, config: Config) -> None:
    for tar in dataset.glob("a-val-*.tar"):
        tar.unlink()
    sources = open_evaluation(config, "val", ("a0", "a1", "a2", "b0", "b1"))
    only = replace(sources, opened=sources.opened[:1])
    model = lambda batch: torch.zeros(len(batch), 5)  # noqa: E731
    with pytest.raises(AgreedError, match=r"21 of 21 samples of val are unreadable(?s:.*)its shard is missing"):
        evaluate(model, config, only, ALONE, Quarantine(), 0)


def test_the_culprit_of_a_mixture_is_found(tmp_path: Path, datasets: Path) -> None:
    """A sound without samples can be decoded but not resampled. Its partners are not bad."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    members = []
    for i in range(40):
        content = BytesIO()
        wave = np.zeros(0 if i == DAMAGED else 80, np.float32)
        soundfile.write(content, wave, 8000, format="WAV", subtype="PCM_16")
        members += [(f"{i:03}.wav", content.getvalue()), (f"{i:03}.cls", b"%d" % (i % 2))]
    foreign_tar(folder / "sounds-train-000000.tar", members)
    call("inspect", [str(folder), "--rebuild"])
    augment = "data.sources.0.augment={encoding: 'wav:uint8', sample_rate_hz: 1000, seconds: 0.01}"
    config = load_config(write_config(tmp_path, datasets, folder), ["train.steps=30", augment])
    got, bad = drawn(config)
    assert [(row.sample, row.reason[:17]) for row in bad] == [(DAMAGED, "cannot be decoded")]
    assert drawn(config, first_step=15)[0] == [row for row in got if row[0] >= 15]
    with_workers = load_config(tmp_path / "tiny.yaml", ["train.steps=30", augment, "data.workers=2"])
    assert drawn(with_workers)[0] == got
