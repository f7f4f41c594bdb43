"""The data for TensorBoard besides curves, read back by its own reader."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bfsys.batch import ByteBatch, Sample
from bfsys.confusion import Answers
from bfsys.supervision.cockpit import (
    BLUE,
    CELL,
    EVENTS,
    MARGIN,
    open_board,
    show_embedding,
    show_evaluation,
    show_event,
    show_lengths,
    show_scalars,
)

CLASSES = ("cat_1", "dog|x", "emu")


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def text_of(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def picture_of(events: EventAccumulator, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


def test_an_evaluation_shows_the_confused_classes(tmp_path: Path) -> None:
    labels, given = [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]
    batch = ByteBatch.from_samples([Sample("", np.zeros(1, np.uint8), label) for label in labels])
    answers = Answers(3)
    answers.add(batch, 5 * torch.nn.functional.one_hot(torch.tensor(given), 3).float())
    with SummaryWriter(str(tmp_path)) as board:
        show_evaluation(board, 7, CLASSES, answers, lambda source, sample: f"{source}_{sample}")
    events = read_back(tmp_path)
    matrix = picture_of(events, "evaluation/confusion")
    corners = matrix[MARGIN + 1 :: CELL, MARGIN + 1 :: CELL][:3, :3]  # of each cell, where its number is not drawn
    assert (corners[1, 1] == BLUE).all()
    assert (corners[2] == 255).all()  # a class without files
    assert corners[0, 1].mean() > corners[0, 0].mean() > corners[1, 1].mean()
    curves = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert curves == {"accuracy_by_class/cat_1": 0.75, "accuracy_by_class/dog|x": 1.0}
    assert text_of(events, "evaluation/lowest_accuracy").splitlines()[2:] == [
        r"| cat\_1 | 75\.0 % | 4 |", r"| dog\|x | 100\.0 % | 2 |",
    ]  # fmt: skip
    worst = text_of(events, "evaluation/worst_files").splitlines()[2]
    assert worst == r"| 0\_\-1 | cat\_1 | dog\|x | 0\.0066 |"


def test_the_embedding_is_compared_value_by_value(tmp_path: Path) -> None:
    embedding = torch.ones(257, 4)
    embedding[100] = -1
    with SummaryWriter(str(tmp_path)) as board:
        show_embedding(board, 1, embedding)
    picture = picture_of(read_back(tmp_path), "model/byte_similarity")
    assert picture.shape[:2] == (256, 256)
    assert picture[0, 0].min() == 255
    assert picture[0, 100].max() == 0
    assert picture[100, 100].min() == 255


def test_lengths_and_events(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as board:
        show_lengths(board, 0, "a", np.array([0, 10, 1000]))
        show_event(board, 3, "bad_step", {"problem": "loss is nan", "samples": ["a/b*c*"]})
    events = read_back(tmp_path)
    assert events.Histograms("system_data/log10_file_bytes_a")[0].histogram_value.max == 3
    assert r"a/b\*c\*" in text_of(events, "events/bad_step")


def test_a_setting_that_is_a_path_in_another_encoding_than_utf8_is_shown_with_escapes(tmp_path):
    open_board(tmp_path, 0, {"train.init_from": os.fsdecode(b"runs/\xff")}).close()
    (events,) = tmp_path.iterdir()
    assert rb"runs/\udcff" in events.read_bytes()


def test_curves_are_complete_after_the_clock_was_set_back(tmp_path: Path) -> None:
    for first_step in (0, 2, 4):
        for file in tmp_path.iterdir():  # as if all earlier starts were an hour later than this one
            made, _, rest = file.name.removeprefix(EVENTS).partition(".")
            file.rename(file.with_name(f"{EVENTS}{int(made) + 3600:010}.{rest}"))
        with open_board(tmp_path, first_step, {}) as board:
            show_scalars(board, first_step + 1, [("loss/train", 1.0)])
            show_scalars(board, first_step + 2, [("loss/train", 1.0)])
    assert [point.step for point in read_back(tmp_path).Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
