"""The augmentation of a file depends on (seed, source, epoch, sample) alone, and batches outlive their loader."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bfsys.config import Augment, Config, Data, Jitter, Source, Train
from bfsys.data.streaming.datasets import make_plan, open_evaluation, open_training
from bfsys.data.streaming.loader import evaluation_rounds
from bfsys.data.streaming.quarantine import Quarantine
from tests.data.conftest import eventually
from tests.data.packed import content, pack, random_shards, rank, read_steps, resource_names
from tests.forked import Forked, run_python

RATE_HZ = 8000
STEPS = 8


def sound(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, rng.uniform(-0.5, 0.5, int(rng.integers(200, 900))), RATE_HZ, "PCM_16", format="WAV")
    return file.getvalue()


def picture(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Mixed sounds over a recording, pictures, and jitter of both formats, followed by random byte transforms."""
    folder, rng = tmp_path_factory.mktemp("augmented"), np.random.default_rng(0)
    (folder / "recordings").mkdir()
    (folder / "recordings" / "hum.wav").write_bytes(sound(rng))
    sounds, pictures = ([(i % 2, make(rng)) for i in range(7)] for make in (sound, picture))
    for name, files in (("sounds", sounds), ("pictures", pictures)):
        pack(folder, name, {"train": [files[:3], files[3:]], "val": [files[:5]]})
    pack(folder, "kept", {"train": [sounds[:4], pictures[:3]]})
    listen = Augment(
        "wav:int16",
        sample_rate_hz=RATE_HZ,
        seconds=0.05,
        background=str(folder / "recordings"),
        speeds=(0.9, 1.0, 1.1),
    )
    sources = (
        Source(str(folder / "sounds"), augment=listen),
        Source(str(folder / "pictures"), augment=Augment("png", image_size=9)),
        Source(str(folder / "kept"), jitter=Jitter()),
    )
    data = Data(sources=sources, batch_samples=12, lanes=4, shuffle_block=3, byte_transforms=NOISE)
    return Config(data=data, train=Train(steps=STEPS), name="run")


NOISE = ("noise:-100:100", "random_shuffle")


def made(config: Config, cut: int = 0, world_size: int = 1) -> dict[tuple, tuple]:
    """(source, epoch, sample) → all results for it, in a run that is resumed after `cut` steps."""
    steps = read_steps(config, 0, cut) + read_steps(config, cut, world_size=world_size)
    plan = make_plan(config, open_training(config))
    found = {}
    for number, step in enumerate(steps):
        for lane, batch in enumerate(step):
            epochs = plan.micro_batch(number, lane).epoch.tolist()
            unmixed = [(None, 0.0)] * len(batch)
            mixed = (
                unmixed
                if batch.second_labels is None
                else zip(batch.second_labels.tolist(), batch.second_share.tolist(), strict=True)
            )
            for epoch, (source, sample, *rest), second in zip(epochs, content(batch), mixed, strict=True):
                found[source, epoch, sample] = (*rest, *(second if source == 0 else (None, 0.0)))
    return found


@pytest.fixture(scope="module")
def reference(augmented: Config) -> dict[tuple, tuple]:
    return made(augmented)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, STEPS), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([1, 2, 4]))
def test_determinism_for_any_ranks_workers_and_resume(
    augmented: Config, reference: dict, cut: int, workers: int, world_size: int
) -> None:
    config = replace(augmented, data=replace(augmented.data, workers=workers))
    assert made(config, cut, world_size) == reference


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 9), st.floats(0.2, 5))
def test_determinism_in_any_order(
    augmented: Config, reference: dict, lanes: int, more: int, block: int, weight: float
) -> None:
    """Runs that read a file in another step, in another lane and in another batch get the same result."""
    first, *others = augmented.data.sources
    data = replace(
        augmented.data,
        sources=(replace(first, weight=weight), *others),
        lanes=lanes,
        batch_samples=3 * lanes + more,
        shuffle_block=block,
    )
    other = made(replace(augmented, data=data))
    common = other.keys() & reference.keys()
    assert common
    assert all(other[k] == reference[k] for k in common)


def test_determinism_epochs_seeds_and_sources_differ(augmented: Config, reference: dict) -> None:
    other_seed = made(replace(augmented, train=replace(augmented.train, seed=1)))
    for source, epoch, sample in reference:
        again = reference.get((source, epoch + 1, sample))
        assert again is None or again[1] != reference[source, epoch, sample][1]
        seeded = other_seed.get((source, epoch, sample))
        assert seeded is None or seeded[1] != reference[source, epoch, sample][1]
    assert {epoch for _, epoch, _ in reference} >= {0, 1, 2}
    seconds = {key: (second, share) for key, (*_, second, share) in reference.items()}
    assert all(0 < share < 1 for (source, *_), (_, share) in seconds.items() if source == 0)
    assert all(share == 0 for (source, *_), (_, share) in seconds.items() if source > 0)
    assert len({share for _, share in seconds.values()}) > 20


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 5000), st.integers(0, 100))
def test_determinism_evaluation_is_the_same_each_time(
    augmented: Config, world_size: int, batch_bytes: int, step: int
) -> None:
    first = evaluated(augmented, 1, 10**6, 0)
    assert len(first) == 10
    assert evaluated(augmented, world_size, batch_bytes, step) == first


def evaluated(config: Config, world_size: int, batch_bytes: int, step: int) -> list[tuple]:
    config = replace(config, data=replace(config.data, eval_batch_bytes=batch_bytes))
    sources = open_evaluation(config, "val", ("x", "y"))
    return sorted(
        file
        for number in range(world_size)
        for batch, counts in evaluation_rounds(config, sources, rank(number, world_size), Quarantine(), step)
        if counts
        for file in content(batch)
    )


ITERATES = """
import sys, psutil
from bfsys.config import Config, Data, Source, Train
from tests.data.packed import open_batches
data = Data(sources=(Source(sys.argv[1]),), batch_samples=8, lanes=4, workers=2)
batches = open_batches(Config(data=data, train=Train(steps=10**6), name="run"))
for _ in range(10):
    next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
for batch in batches:
    pass
"""


def test_hand_over_leaves_nothing_behind_a_sigkill(tmp_path: Path) -> None:
    path = pack(tmp_path, "a", {"train": random_shards([30, 30], np.random.default_rng(0), 4000)})
    before = resource_names()
    process = Forked(run_python, ("-c", ITERATES, str(path)), {})
    try:
        eventually(lambda: process.said()[0].endswith("\n"))
        workers = [psutil.Process(int(pid)) for pid in process.said()[0].split()]
        assert len(workers) == 2
        names = resource_names() - before  # may include names of other processes, which remove them
    finally:
        process.kill()
    eventually(lambda: not any(alive(worker) for worker in workers))
    eventually(lambda: not names & resource_names())


def alive(process: psutil.Process) -> bool:
    """Whether a process runs. An orphan that has ended may be a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
