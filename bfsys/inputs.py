"""The inputs of a model, and how it reads each of them: files by path, bytes, arrays of bytes, open files.

If a file has none of the formats of the training files, its answer may be unreliable. The reader therefore reports such
a file, or encodes it. If some training files were packed unchanged, their formats are not known, and nothing is
reported.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import numpy as np

from bfsys.batch import Sample
from bfsys.data.media.input_formats import FileKind, InputFormat, kind_of
from bfsys.data.packing.folders import regular_files
from bfsys.data.streaming.byte_transforms import ByteTransform, apply
from bfsys.encode import CannotDecode, encoded
from bfsys.errors import UserError, collecting
from bfsys.files import open_input, read_up_to
from bfsys.out_of_distribution import ReferenceFiles, text_of
from bfsys.process import free_memory_bytes

Input: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | BinaryIO
"""A path, the content of a file, a uint8 array [n], or a file that is open for reading in binary mode."""

ALLOWED = "a path, bytes, a NumPy array uint8 [n], or a file opened in binary mode"
MOST_BYTES = 2**31 - 1  # of an input: as many as an exported program takes
SMALL_BYTES = 64 << 20
TEXT_SHOWN = 200  # characters that a message shows of a string that may not be a path
# Decoders temporarily change global state: the filters of warnings, and the number of PyTorch's threads.
_DECODING = threading.Lock()


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """The paths of the files in a folder and in the folders below it, sorted, as `bfsys predict FOLDER` takes them.

    Hidden files and those of the operating system are left out, and named on standard error. Raises UserError if
    `folder` is not a folder, contains no files, or contains something that is not a regular file.

    >>> files_in("photos")
    ['photos/cat/001.jpg', 'photos/dog/001.jpg']
    """
    problems: list[str] = []
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"the folder: got {type(folder).__name__}; a path is allowed")
    name = os.fspath(folder)
    if not os.path.isdir(name):
        raise UserError(f"{name}: is not a folder")
    paths = regular_files(name, problems)
    if problems:
        raise UserError(*problems)
    return paths


def is_one(inputs: Input | Iterable[Input]) -> bool:
    """Whether this is a single input. Arrays of other libraries also count as one input, and are refused later."""
    return (
        isinstance(inputs, str | os.PathLike | bytes | bytearray | memoryview)
        or hasattr(inputs, "__array__")
        or hasattr(inputs, "read")
        or not isinstance(inputs, Iterable)
    )


def named(inputs: Input | Iterable[Input]) -> Iterator[tuple[str, Input]]:
    """Each input with its name in messages: a path, or its position among the inputs.

    Raises UserError if the first one is a number, since each further byte of a file would then be a problem.
    """
    if is_one(inputs):
        yield _name_of(inputs, "the input"), inputs  # type: ignore[misc]
        return
    for place, one in enumerate(inputs):  # type: ignore[arg-type]
        if place == 0 and isinstance(one, int | np.integer):
            raise UserError("inputs[0]: got a number; if the numbers are the bytes of one file, pass bytes(…)")
        yield _name_of(one, f"inputs[{place}]"), one  # type: ignore[misc]


def _name_of(one: object, otherwise: str) -> str:
    if isinstance(one, str | os.PathLike):
        return os.fsdecode(one)
    name = getattr(one, "name", None)
    return f"{otherwise} ({name})" if isinstance(name, str) else otherwise


@dataclass(frozen=True)
class Reader:
    """Reads inputs in the way in which the model read its training files. It has no state."""

    origin: str
    """The name of the model in messages: the path from which it was loaded."""
    formats: tuple[InputFormat, ...]
    """The known formats of the training files."""
    reads_any_format: bool
    """Whether some training files were used as they were, so their formats are unknown."""
    transforms: tuple[ByteTransform, ...]
    least_bytes: int
    """Length of the shortest file that the model accepts, after the transforms."""
    references: ReferenceFiles | None = None
    """A description of files of the run; None if the checkpoint has none."""
    encode_option: str = "--encode (encode=True in Python)"
    """The name in messages of the option to encode files."""

    def samples(
        self, inputs: Iterable[tuple[str, Input]], problems: list[str], say: Callable[[str], None], *, encode: bool
    ) -> Iterator[Sample]:
        """Read named inputs one by one. Problems of inputs that cannot be used are added to `problems`.

        `encode` converts pictures and sounds into a format of the training files. Raises UserError then if no format is
        known. Otherwise `say` is called for the first input that has none of these formats. It is also called for the
        first input whose out-of-distribution score is above 1; in all, it is called once at most.
        """
        if encode and not self.formats:
            raise UserError(
                f"{self.origin}: no format is known to encode files in: its training files were used unchanged or "
                "were transformed beforehand, or its checkpoint does not record formats; leave out "
                f"{self.encode_option}"
            )
        compares = bool(self.formats) and (encode or not self.reads_any_format)
        # Whether a file has a format may depend on its length.
        first_bytes = self.transforms[0].first_bytes if self.transforms and not compares else None
        said = False
        for name, one in inputs:
            sample = None
            with collecting(problems):
                data = read_input(name, one, first_bytes)
                if compares and len(data) and not any(f.matches(data) for f in self.formats):
                    if encode:
                        data = self._encoded(name, data)
                    elif not said:
                        say(self._note(name, data))
                        said = True
                sample = self.transformed(name, data)
            if sample and self.references and not said and (score := self.references.score(sample.data)) > 1:
                say(
                    f"{name} was compared with {self.references.describe()} of {self.origin} and resembles none of "
                    f"them (out-of-distribution score {text_of(score)}; above 1 is unusual), so the prediction may be "
                    "unreliable"
                )
                said = True
            if sample:
                yield sample

    def transformed(self, name: str, data: np.ndarray) -> Sample:
        """A file (uint8 [n]) after the run's transforms. Raises UserError if the result is empty or too short."""
        data = apply(self.transforms, data, np.random.default_rng(0))
        if not len(data):
            raise UserError(f"{name}: empty; there is nothing to classify")
        if len(data) < self.least_bytes:
            raise UserError(f"{name}: {len(data)} bytes; this model needs at least {self.least_bytes} (model.mode)")
        return Sample(name, data)

    def _encoded(self, name: str, data: np.ndarray) -> np.ndarray:
        """The file in the first format of its modality. A file of unknown kind is tried as a picture and as a sound.

        If the model reads files of any format, a file without a matching format stays as it is.
        """
        kind = kind_of(data)
        formats = self._formats_for(kind)
        if self.reads_any_format and not (kind and formats):
            return data
        if not formats:
            raise UserError(f"{name}: {self._what(kind)}, and {self.origin} was trained on {self._trained_on()}")
        reasons = []
        for to in formats:
            try:
                with _DECODING:
                    return np.frombuffer(encoded(name, data.tobytes(), to.encoding, to.fitting), np.uint8)
            except CannotDecode as error:
                reasons.append(str(error).removeprefix(f"{name}: "))
        raise UserError(f"{name}: {'; '.join(reasons)}")

    def _formats_for(self, kind: FileKind | None) -> list[InputFormat]:
        """The first format of each modality, or only of the modality of `kind`."""
        first: dict[str | None, InputFormat] = {}
        for one in self.formats:
            if kind is None or one.encoding.modality == kind.modality:
                first.setdefault(one.encoding.modality, one)
        return list(first.values())

    def _note(self, name: str, data: np.ndarray) -> str:
        kind = kind_of(data)
        remedy = f"; add {self.encode_option}" if self._formats_for(kind) else ""
        return (
            f"{name} {self._what(kind)}, but {self.origin} was trained on {self._trained_on()}, so the prediction may "
            f"be unreliable{remedy}"
        )

    def _trained_on(self) -> str:
        return " and ".join(f.describe() for f in self.formats)

    def _what(self, kind: FileKind | None) -> str:
        if kind is None:
            return "is not a picture or sound of a known format"
        names = {f.encoding.text.partition(":")[0] for f in self.formats}
        return f"is {kind.name}" + (" of another size or make" if kind.name.split()[-1].lower() in names else "")


def read_input(name: str, one: Input, first_bytes: int | None = None) -> np.ndarray:
    """The bytes of an input, uint8 [n]; an open file is read from its current position to its end.

    With `first_bytes`, a file is read only until there are that many bytes or slightly more. Raises UserError, with
    `name`, if the input cannot be read or has another type.
    """
    try:
        if isinstance(one, str | os.PathLike):
            return np.frombuffer(_read_path(name, one, first_bytes), np.uint8)
        if isinstance(one, bytes | bytearray):
            return np.frombuffer(one, np.uint8)
        if isinstance(one, memoryview):
            return _bytes_of_view(name, one)
        if isinstance(one, np.ndarray):
            if one.dtype != np.uint8 or one.ndim != 1:
                raise UserError(f"{name}: got an array {one.dtype} {list(one.shape)}; allowed is uint8 [n]")
            return one
        if hasattr(one, "read"):
            return np.frombuffer(_read_open_file(name, one, first_bytes), np.uint8)
    except MemoryError:
        raise UserError(f"{name}: not enough memory to read it") from None
    kind = f"{type(one).__module__}.{type(one).__qualname__}".removeprefix("builtins.")
    raise UserError(f"{name}: got {kind}; allowed is {ALLOWED}")


def _read_path(name: str, path: str | os.PathLike[str], first_bytes: int | None) -> bytearray:
    try:
        with open_input(path) as file:
            return _read_rest(name, file, first_bytes, os.fstat(file.fileno()).st_size)
    except IsADirectoryError:
        raise UserError(f"{name}: is a folder; pass its files: bfsys.files_in({name!r})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", str(error))
        if isinstance(path, str) and number in (None, errno.ENOENT, errno.ENAMETOOLONG):
            shown = name if len(name) <= TEXT_SHOWN else f"{name[:TEXT_SHOWN]}…"
            reason = f"{reason}; if this is content and not a path, pass bytes"
            raise UserError(f"{shown}: cannot be read: {reason}") from None
        raise UserError(f"{name}: cannot be read: {reason}") from None


def _bytes_of_view(name: str, view: memoryview) -> np.ndarray:
    if view.itemsize != 1 or view.ndim != 1:
        shape = list(view.shape or ())
        raise UserError(f"{name}: got a memoryview of {view.format!r} {shape}; allowed is one of bytes: .cast('B')")
    return np.asarray(view).view(np.uint8)


def _read_open_file(name: str, file: BinaryIO, first_bytes: int | None) -> bytearray:
    if getattr(file, "closed", False):
        raise UserError(f"{name}: is a closed file; pass it while it is open, or pass its path")
    try:
        if not isinstance(nothing := file.read(0), bytes | bytearray):
            raise UserError(
                f"{name}: its read() gives {type(nothing).__name__}; open it in binary mode: open(path, 'rb')"
            )
        return _read_rest(name, file, first_bytes)
    except io.UnsupportedOperation:
        raise UserError(f"{name}: is open for writing only; open it with open(path, 'rb')") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None


def _read_rest(name: str, file: BinaryIO, first_bytes: int | None, size_bytes: int = 0) -> bytearray:
    """The rest of a file, or only its first bytes. Raises UserError if it is too long, as its `size_bytes` may tell
    before it is read."""
    is_small = 0 < size_bytes < SMALL_BYTES  # to ask for the free memory takes longer than to read a small file
    most = MOST_BYTES if is_small else min(MOST_BYTES, free_memory_bytes() // 2)
    if first_bytes is not None and first_bytes <= most:
        return read_up_to(file, first_bytes)
    if size_bytes > most or len(content := read_up_to(file, most)) > most:
        raise UserError(
            f"{name}: has more than {most:,} bytes; allowed are {MOST_BYTES:,}, and no more than half of the memory "
            "that is free"
        )
    return content
