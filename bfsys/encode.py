"""Files in the form that a model reads: decoded and encoded again, with their bytes transformed.

For every file, OUT/.encoded.jsonl holds a hash of its source (path, size, time of change) and of the settings. A second
start therefore keeps the files that the first has made. Any other file in OUT is not overwritten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bfsys.data.media.encodings import Encoding, Fitting, WrongRateError, library_version, reencode
from bfsys.data.media.pictures import peculiarities_of
from bfsys.data.packing.folders import regular_files
from bfsys.data.packing.left_out import ENCODE_NOTES as NOTES
from bfsys.data.streaming.byte_transforms import ByteTransform, apply
from bfsys.errors import UserError
from bfsys.files import exists, is_dir, read_regular, remove_unfinished, replacing, try_lock


class Notes:
    """Notes on the sources and settings of the files in OUT, a line for each. A later line replaces an earlier one."""

    def __init__(self, out: Path, encoding: Encoding, fitting: Fitting, transforms: Sequence[ByteTransform]) -> None:
        self._out, self._path = out, out / NOTES
        self._how = [encoding.text, library_version(encoding), repr(fitting), *(t.identity for t in transforms)]
        self._noted: dict[str, str] = {}

    def read(self) -> None:
        """Read earlier notes. Raises UserError if they cannot be read."""
        try:
            lines = read_regular(self._path).splitlines()
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror}") from None
        for line in lines:
            try:
                name, made_from = json.loads(line)
                self._noted[name] = made_from
            except (ValueError, TypeError):  # a line that a full disk or a crash truncated, or other JSON
                continue

    def has(self, source: Path, target: Path) -> bool:
        """Whether an existing target was made from the current source with the current settings."""
        return self._noted.get(self._name(target)) == self.hash_of(source)

    def add(self, target: Path, made_from: str) -> None:
        """Add a note. Call this before the target gets its final name, so that a stop in between leaves no file without
        a note."""
        with open(self._path, "ab") as file:
            # It begins with a line break, since the previous line may be truncated
            file.write(b"\n" + json.dumps([self._name(target), made_from]).encode() + b"\n")

    def _name(self, target: Path) -> str:
        return str(target.relative_to(self._out))

    def hash_of(self, source: Path) -> str:
        """Hash of the current source and settings. It does not reveal them to the recipients of OUT."""
        status = source.stat()
        identity = [*self._how, str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@contextmanager
def locked(out: Path, targets: Iterable[Path]) -> Iterator[None]:
    """Make OUT, lock it against other processes that encode into it, and remove unfinished files of killed ones."""
    names = defaultdict(list)
    for target in targets:
        names[target.parent].append(target.name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / NOTES, "ab")  # noqa: SIM115 (below)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    with file:
        if not try_lock(file):
            raise UserError(
                f"{out}: another process is encoding into this folder; wait until it has ended, or choose another OUT"
            )
        for folder, of_folder in names.items():
            remove_unfinished(folder, of_folder)
        yield


def targets_of(src: Path, out: Path, encoding: Encoding, problems: list[str]) -> dict[Path, Path]:
    """The target of each file. If files differ only in the extension, it is appended to their names."""
    if not exists(src):
        problems.append(f"{src}: there is no such file or folder")
        return {}
    root, sources = src.parent, [src]
    if is_dir(src):
        if out.resolve().is_relative_to(src.resolve()):
            problems.append(f"{out}: is inside {src}, so its files would become input; choose an OUT outside")
            return {}
        root, sources = src, [Path(path) for path in regular_files(str(src), problems)]
    if not encoding.extension:
        return {source: out / source.relative_to(root) for source in sources}
    alike = Counter(source.with_suffix("") for source in sources)
    targets: dict[Path, Path] = {}
    first: dict[Path, Path] = {}
    for source in sources:
        extension = source.suffix[1:].lower()
        name = f"{source.stem}-{extension}" if alike[source.with_suffix("")] > 1 and extension else source.stem
        target = out / source.relative_to(root).with_name(f"{name}.{encoding.extension}")
        if first.setdefault(target, source) is not source:
            problems.append(f"{source}: would become {target}, as {first[target]} does; rename one of them")
        targets[source] = target
    return targets


def kept_of(targets: dict[Path, Path], notes: Notes, problems: list[str]) -> set[Path]:
    """The targets that an earlier start made. Other existing targets are problems. Raises UserError if the notes cannot
    be read."""
    existing = {source: target for source, target in targets.items() if os.path.exists(target)}
    notes.read()  # after the files are listed: another process may be adding notes, and then files
    kept = {target for source, target in existing.items() if notes.has(source, target)}
    problems += [
        f"{target}: exists and is not overwritten, since it was not made from the current {source} with these "
        "arguments; choose another OUT, or remove it"
        for source, target in existing.items()
        if target not in kept
    ]
    return kept


class CannotDecode(UserError):
    """A file is not a picture or sound, it is damaged, or the encoding does not support its sample rate."""


def encoded(name: str, content: bytes, encoding: Encoding, fitting: Fitting) -> bytes:
    """The file in the given encoding. Raises CannotDecode, and UserError if there is not enough memory."""
    if encoding.encode is None:
        return content
    try:
        return reencode(content, encoding, fitting)
    except MemoryError:
        raise UserError(f"{name}: not enough memory for this file") from None
    except WrongRateError as error:
        raise CannotDecode(f"{name}: cannot be converted to {encoding.text}: {error}") from None
    except Exception as error:  # decoders raise any exception
        raise CannotDecode(f"{name}: cannot be decoded as {encoding.modality}: {error}") from None


def make(
    source: Path,
    target: Path,
    encoding: Encoding,
    fitting: Fitting,
    transforms: Sequence[ByteTransform],
    notes: Notes,
    peculiar: Counter[str],
) -> str | None:
    """Make one file, and count its peculiarities. Returns None, or the problem of this file. Raises UserError if no
    file can be written."""
    try:
        made_from, content = notes.hash_of(source), read_regular(source)
    except MemoryError:
        raise UserError(f"{source}: not enough memory for this file") from None
    except OSError as error:
        return f"{source}: cannot be read: {error.strerror}"
    try:
        form = encoded(str(source), content, encoding, fitting)
    except CannotDecode as error:
        return str(error)
    found = peculiarities_of(content, encoding.modality)
    made = apply(transforms, np.frombuffer(form, np.uint8), np.random.default_rng())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            file.write(made.tobytes())
            notes.add(target, made_from)
        peculiar.update(found)
    except OSError as error:
        problem = f"{target}: cannot be written: {error.strerror}"
        if error.errno == errno.ENAMETOOLONG:  # other files may have shorter names
            return problem
        raise UserError(problem) from None
    return None
