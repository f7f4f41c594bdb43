"""TensorBoard's views of a run: curves, confusion matrix, accuracy by class, the worst files, the embedding, lengths of
files, and events.

Pictures are drawn with Pillow, because Matplotlib would take a second at each evaluation and more for its import.
TensorBoard and Pillow are imported only on rank 0, which uses them. With their dependencies, they are a tenth of the
files that a rank would open at its start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bfsys.confusion import Answers
from bfsys.errors import one_line
from bfsys.model.sizes import PAD_BYTE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard sorts by name. These tags come before those of the system.
SCORE_TAGS = {"loss": "loss", "top1": "accuracy", "top5": "accuracy_top5"}
MOST_CLASSES_DRAWN = 100
MOST_CLASSES_WITH_CURVES = 50
CELL, MARGIN, NAME_CHARACTERS = 26, 110, 16  # pixels of a cell and beside the matrix; characters of a class name
EVENTS = "events.out.tfevents."  # names of TensorBoard's files begin with this and the time at which they were made
WHITE, BLUE = np.array([255.0, 255, 255]), np.array([8.0, 48, 107])


def open_board(folder: Path, first_step: int, settings: Mapping[str, int | float | str]) -> SummaryWriter:
    """Open TensorBoard's files of a run that resumes after `first_step` steps, and write its settings for HParams."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    _date_back(folder)
    board = SummaryWriter(str(folder), purge_step=first_step + 1)
    # Paths that are not UTF-8 contain surrogates, which TensorBoard's records cannot hold.
    texts = {name: one_line(value) if isinstance(value, str) else value for name, value in settings.items()}
    for summary in hparams(texts, dict.fromkeys(("accuracy/val", "loss/val"), 0.0)):
        board._get_file_writer().add_summary(summary)
    return board


def _date_back(folder: Path) -> None:
    """Rename the files of earlier starts whose time has not come yet, because the clock was set back.

    TensorBoard reads files in the order of their names. It would read the new file first, and drop its points when the
    older file begins at an earlier step.
    """
    now = int(time.time())
    for path in folder.glob(f"{EVENTS}*"):
        rest = path.name.removeprefix(EVENTS)
        made = rest.partition(".")[0]
        if made.isdecimal() and int(made) > now:
            path.rename(path.with_name(f"{EVENTS}{now - 1:010}.{rest}"))  # they keep their order


def show_scalars(board: SummaryWriter, step: int, scalars: Iterable[tuple[str, float]]) -> None:
    """Write points of curves in one record, because TensorBoard opens its file again for each record."""
    from torch.utils.tensorboard.summary import Summary, scalar

    record = Summary()
    for tag, value in scalars:
        record.MergeFrom(scalar(tag, value))
    board._get_file_writer().add_summary(record, step)


def show_line(board: SummaryWriter, line: Mapping[str, Any]) -> None:
    """Write the curves' points of a line of metrics.jsonl."""
    scalars = ((tag, value) for tag, value in _scalars_of(line) if value is not None)
    show_scalars(board, line["step"], scalars)


def _scalars_of(line: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    part = "train" if line["kind"] == "train" else "val"
    for name, tag in SCORE_TAGS.items():
        yield f"{tag}/{part}", line[name]
        for source, values in line["sources"].items() if len(line["sources"]) > 1 else ():
            yield f"{tag}/{part}_{source}", values[name]
    if part == "val":
        yield "system_time/evaluation_s", line["seconds"]
        return
    if "content_loss" in line:
        yield "loss/content", line["content_loss"]
    yield "optimizer/learning_rate", line["learning_rate"]
    yield "optimizer/grad_norm", line["grad_norm"]
    yield "system_speed/samples_per_s", line["samples_per_s"]
    yield "system_speed/MB_per_s", line["bytes_per_s"] / 1e6
    yield "system_speed/tokens_per_s", line["tokens_per_s"]
    yield "system_speed/model_TFLOP_per_s", line["model_tflop_per_s"]
    yield "system_speed/mfu", line["mfu"]
    yield "system_speed/matmul_share", line["matmul_share"]
    yield "system_time/step_s", line["step_s"]
    yield "system_time/data_wait_share", line["data_wait_share"]
    yield "system_data/bad_files", line["bad_files"]
    yield "system_data/replaced_samples", line["replaced_samples"]
    yield "system_memory/padding_share", line["padding_share"]
    yield "system_memory/peak_MiB", line["peak_memory_mib"]
    yield "system_memory/reserved_MiB", line.get("reserved_memory_mib")
    yield "system_memory/allocation_retries", line.get("allocation_retries")
    yield "system_goodput/share", line["goodput"]
    for cause, seconds in line["seconds"].items():
        yield f"system_goodput/{cause}_s", seconds
    yield "system_goodput/skipped_steps", line["skipped_steps"]


def show_overview(board: SummaryWriter, source_names: Sequence[str]) -> None:
    """Define custom charts: training beside validation in one chart, jointly and for each source."""
    parts = {"all": "", **{name: f"_{name}" for name in source_names if len(source_names) > 1}}
    charts = {
        tag: {
            title: ["Multiline", [f"^{tag}/train{suffix}$", f"^{tag}/val{suffix}$"]] for title, suffix in parts.items()
        }
        for tag in ("accuracy", "loss")
    }
    board.add_custom_scalars(charts)


def show_evaluation(
    board: SummaryWriter, step: int, classes: Sequence[str], answers: Answers, key_of: Callable[[int, int], str]
) -> None:
    """Show the confusion matrix, accuracy by class and the worst files. `key_of` maps (source, sample) to a key."""
    files, right = answers.totals()
    seen = np.flatnonzero(files)
    if len(classes) <= MOST_CLASSES_DRAWN:
        labels, given, counts = answers.counts()
        matrix = np.zeros((len(classes), len(classes)))
        matrix[labels, given] = counts
        board.add_image("evaluation/confusion", confusion_picture(classes, matrix), step, dataformats="HWC")
    if len(classes) <= MOST_CLASSES_WITH_CURVES:
        show_scalars(board, step, ((f"accuracy_by_class/{classes[n]}", right[n] / files[n]) for n in seen.tolist()))
    lowest = sorted(seen.tolist(), key=lambda number: right[number] / files[number])[:MOST_CLASSES_WITH_CURVES]
    rows = [(classes[n], f"{100 * right[n] / files[n]:.1f} %", f"{files[n]:.0f}") for n in lowest]
    board.add_text("evaluation/lowest_accuracy", table(("class", "top-1", "files"), rows), step)
    worst = [
        (key_of(file.source, file.sample), classes[file.label], classes[file.answer], f"{file.probability:.2g}")
        for file in answers.worst
    ]
    columns = ("file", "its class", "answer", "probability of its class")
    board.add_text("evaluation/worst_files", table(columns, worst), step)


def show_embedding(board: SummaryWriter, step: int, embedding: Tensor) -> None:
    """Show the cosine similarity of the vectors of all byte values, [values, D]: black is -1, white is 1."""
    vectors = embedding[:PAD_BYTE].float()
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    similarity = (vectors @ vectors.T + 1) / 2
    board.add_image("model/byte_similarity", similarity.cpu().numpy(), step, dataformats="HW")


def show_lengths(board: SummaryWriter, step: int, source: str, lengths: np.ndarray) -> None:
    """Show a histogram of the decimal logarithm of the training files' lengths in bytes."""
    board.add_histogram(f"system_data/log10_file_bytes_{source}", np.log10(np.maximum(1, lengths)), step)


def show_event(board: SummaryWriter, step: int, kind: str, facts: dict) -> None:
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in facts.items()]
    board.add_text(f"events/{kind}", table(("", f"step {step}"), rows), step)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with escaped cells."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(_literal, row)) + " |" for row in rows)])


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|~$" else c for c in text)


def confusion_picture(classes: Sequence[str], matrix: np.ndarray) -> np.ndarray:
    """Return uint8 [height, width, 3]. Rows are classes, columns are answers; darker is a larger share of the row."""
    from PIL import Image, ImageDraw, ImageFont

    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    cells = WHITE + share[:, :, None] * (BLUE - WHITE)
    side = CELL * len(classes)
    image = Image.new("RGB", (MARGIN + side + 1, MARGIN + side + 1), "white")
    image.paste(Image.fromarray(cells.astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)), (MARGIN, MARGIN))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    across = Image.new("RGB", (MARGIN, side), "white")  # names of answers, rotated below
    turned = ImageDraw.Draw(across)
    for number, name in enumerate(classes):
        shown = name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"
        middle = number * CELL + CELL // 2
        draw.text((MARGIN - 6, MARGIN + middle), shown, fill="black", font=font, anchor="rm")
        turned.text((6, middle), shown, fill="black", font=font, anchor="lm")
    image.paste(across.rotate(90, expand=True), (MARGIN, 0))
    for row, column in np.argwhere(matrix):
        colour = "white" if share[row, column] > 0.5 else "black"
        place = (MARGIN + column * CELL + CELL // 2, MARGIN + row * CELL + CELL // 2)
        draw.text(place, _short(matrix[row, column]), fill=colour, font=font, anchor="mm")
    draw.text((6, 6), "class: rows\nanswer: columns", fill="gray", font=font)
    return np.asarray(image)


def _short(count: float) -> str:
    return f"{count:.0f}" if count < 1000 else f"{count / 1000:.0f}k"
