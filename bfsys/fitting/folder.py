"""The folder that is given to `bfsys fit`: whether it can be trained on, and how it is packed."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from bfsys.data.media.encodings import Fitting, parse_encoding
from bfsys.data.packing.checks import check_files
from bfsys.data.packing.listing import Listing
from bfsys.data.packing.pack import Packing, list_source, name_bad_files, pack
from bfsys.data.packing.staging import note_on_skipped, skipped_files
from bfsys.data.storage.description import DESCRIPTION, read_description
from bfsys.data.storage.shards import open_split
from bfsys.errors import UserError, one_line, os_errors_as
from bfsys.files import exists, is_dir, read_regular, replace_file
from bfsys.fitting.choice import Choice, Format
from bfsys.fitting.request import Request
from bfsys.fitting.survey import Survey, survey_of

FITTED = "fitted"  # extension of the file beside a dataset that names its source folder


def survey_folder(request: Request) -> Survey:
    """Survey the folder. Raises UserError if it cannot be packed or trained on."""
    if is_packed(request.folder):
        found = survey_of_packed(request.folder)
        trained = trained_classes(request.folder)
    else:
        listing = listed(request)
        check_splits(request.folder, {file.split for file in listing.files})
        found = survey_of(listing.files, listing.classes)
        trained = sorted({file.class_name for file in listing.files if file.split == "train"})
    check_classes(request.folder, trained)
    return found


def trained_classes(dataset: Path) -> list[str]:
    """The classes of a packed dataset that have training files."""
    counts = read_description(dataset)["splits"]["train"]["class_counts"]
    return [name for name, count in counts.items() if count]


def check_classes(folder: Path, trained: list[str]) -> None:
    """Raise UserError unless two classes have training files."""
    if len(trained) < 2:
        which = f"only the class {trained[0]!r} has" if trained else "no class has"
        inner = next((path for name in trained if has_folders(path := folder / name)), None)
        remedy = f". If the folders in {inner} are the classes or splits, give {inner} to fit" if inner else ""
        raise UserError(f"{folder}: {which} training files; a classifier needs at least 2 classes{remedy}")


def has_folders(folder: Path) -> bool:
    return is_dir(folder) and any(is_dir(path) for path in folder.iterdir())


def is_packed(folder: Path) -> bool:
    return exists(folder / DESCRIPTION)


def survey_of_packed(folder: Path) -> Survey:
    """Survey a packed dataset. Its files are not re-encoded."""
    description = read_description(folder)
    check_splits(folder, set(description["splits"]))
    splits = {split: open_split(folder, split) for split in description["splits"]}
    lengths = {name: split.samples["length"].astype(np.int64) for name, split in splits.items()}
    return Survey(
        classes=tuple(description["classes"]),
        files={split: len(of_split) for split, of_split in lengths.items()},
        train_bytes=lengths["train"],
        longest=max(int(of_split.max()) for of_split in lengths.values() if len(of_split)),
        kinds={f"packed {description['encoding']}": len(lengths["train"])},
        modality=None,
        typical_size=0.0,
        rate_hz=0,
        digest=xxhash.xxh3_128_hexdigest("".join(split.fingerprint for split in splits.values()).encode()),
    )


def check_splits(folder: Path, splits: set[str]) -> None:
    """Raise UserError unless there is a train split and a val or test split."""
    if "train" not in splits or not splits & {"val", "test"}:
        raise UserError(
            f"{folder}: has the split {', '.join(sorted(splits))} alone; a train split and a val or test split are "
            "needed. Put the class folders into the folder itself, and a tenth of the files is set aside for validation"
        )


def listed(request: Request) -> Listing:
    """List the files with their sizes and splits."""
    packing = packing_of(request, Format())
    listing = list_source(packing)
    check_files(listing, None, packing.encoding, packing.share_for_val)
    problems = listing.problems + ([] if request.skip_bad else name_bad_files(listing.bad))
    if any("--from" in problem for problem in problems):
        problems.append("--from is an option of `bfsys pack`: pack the files by it, and give the packed folder to fit")
    if problems:
        raise UserError(*problems)
    trained = {file.class_name for file in listing.files if file.split == "train"}
    for name in sorted(set(listing.classes) - trained):
        print(f"note: the class {one_line(name)} has no training file, so the model cannot learn it", file=sys.stderr)
    return listing


def pack_all(request: Request, choice: Choice) -> tuple[str, str]:
    """Return the packed training data and evaluation data. They are one dataset unless training files are augmented."""
    if is_packed(request.folder):
        return str(request.folder), str(request.folder)
    encoded = packing_of(request, choice.format)
    pack_one(request, encoded)
    if not choice.format.augmented:
        return str(encoded.folder), str(encoded.folder)
    # Augmentation decodes the stored files, so those that cannot be decoded are left out here, too
    stored = replace(packing_of(request, Format()), known_bad=skipped_files(encoded.folder))
    pack_one(request, stored)
    return str(stored.folder), str(encoded.folder)


def pack_one(request: Request, packing: Packing) -> None:
    claim(packing.folder, request.folder)
    pack(packing)
    parts = read_description(packing.folder)["splits"].items()
    files = ", ".join(f"{part['samples']:,} {name}" for name, part in parts)
    print(f"packed      {packing.folder} ({packing.encoding.text}): {files}", flush=True)
    if note := note_on_skipped(packing.folder):
        print(f"  {note}", flush=True)


def claim(folder: Path, source: Path) -> None:
    """Record the source folder of a dataset beside it. Raises UserError if the dataset has another source: earlier runs
    that were trained on it would then be evaluated on other files."""
    note, ours = folder.with_name(f".{folder.name}.{FITTED}"), str(source.absolute())
    with suppress(OSError):
        theirs = read_regular(note).decode(errors="surrogateescape")
        if theirs == ours:
            return
        if is_packed(folder):
            raise UserError(f"{folder}: holds the packed files of {theirs}; give another --name or --shards")
    if is_packed(folder):
        raise UserError(f"{folder}: holds a dataset that `bfsys fit` did not pack; give another --name or --shards")
    with os_errors_as(f"{folder}: cannot be written"):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, ours.encode(errors="surrogateescape"))


def packing_of(request: Request, form: Format) -> Packing:
    size = form.image_size or form.sample_rate_hz
    return Packing(
        src=request.folder,
        folder=request.shards / (f"{request.name}-{size}" if size else request.name),
        layout="tree" if is_dir(request.folder) else "filelist",
        encoding=parse_encoding(form.encoding),
        fitting=Fitting(form.image_size, form.sample_rate_hz, form.seconds),
        skip_bad=request.skip_bad,
    )
