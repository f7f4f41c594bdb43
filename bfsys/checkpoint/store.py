"""The copies of a run's checkpoints in an object store, opened by fsspec.

    URL/checkpoints/step_00001000/     the files of the checkpoint, and manifest.json, written last and removed first

An object store cannot rename a directory, so a copy counts by its manifest alone. A copy without a manifest, or with a
file that does not match it, is not a checkpoint. Nothing here imports PyTorch.

Files are streamed in blocks and hashed on the way, in both directions. Memory is therefore bounded by a few blocks, and
a file that was damaged on the disk does not become a copy. fsspec's `put` and `get` of whole folders are not used,
because they keep no order, hash nothing, and hold up to ten parts of every file in memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from bfsys.checkpoint.files import (
    MANIFEST,
    NAME,
    Damaged,
    Unusable,
    checkpoint_name,
    checksum_mismatch,
    parse_manifest,
    step_of_name,
)
from bfsys.checkpoint.retention import RetentionPolicy, steps_to_keep
from bfsys.errors import EXIT_CRASHED, EXIT_USER_ERROR, UserError
from bfsys.files import is_dir, open_regular, read_regular, replace_file, writing
from bfsys.locations import hide_in
from bfsys.object_stores import problem_of_url

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each retry of a request; the libraries below also retry
BLOCK_BYTES = 16 << 20
MOST_BLOCKS = 5000  # of a file; S3 takes 10,000 parts
FILES_AT_A_TIME = 4
# Errors that are not retried, by type, by errno, and by the name of the type or S3's code, since the libraries of the
# stores are not imported here.
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, NotImplementedError)
PERMANENT_ERRNOS = (errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ERRORS_OF_SETTINGS = (
    "AuthorizationHeaderMalformed",  # S3's codes: a wrong region, token or name of a bucket
    "InvalidBucketName",
    "InvalidToken",
    "PermanentRedirect",
    "ConfigParseError",
    "DefaultCredentialsError",  # of Google's library; the others are of botocore
    "InvalidRegionError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "ValueError",  # of botocore, for an endpoint that is not a URL
)


class StoreError(UserError):
    """The store cannot be read or written. The exit code is that of a crash if the error may be transient."""


class _DiskError(Exception):
    """Wraps an OSError of the local disk, to distinguish it from the store's. `Store._tried` raises the OSError."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(error) from None


class Store:
    """The checkpoints of one run in a store. Methods retry, and raise StoreError if the store still fails."""

    def __init__(
        self, url: str, *, pauses_s: tuple[float, ...] = PAUSES_S, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """`url` is the URL of the run, whose checkpoints are in URL/checkpoints. Raises UserError if it is not valid.
        `say` receives the errors that are retried."""
        if problem := problem_of_url(url):
            raise UserError(problem)
        import fsspec

        self.url, self._pauses_s, self._say = f"{url.rstrip('/')}/checkpoints", pauses_s, say
        self.moved = time.monotonic()
        """The time of the last progress. A retry does not count, or a silent server would delay a run too long."""
        # A cached listing would not show changes by other processes.
        options: dict = {"skip_instance_cache": True, "use_listings_cache": False}
        if url.startswith(("file:", "local:")):  # these need folders; object stores have none
            options["auto_mkdir"] = True
        self._fs, self._root = self._tried("is not opened", lambda: fsspec.url_to_fs(self.url, **options))

    def names(self) -> list[str]:
        """The names of all copies, complete or not, the oldest first."""

        def listed() -> list[str]:
            try:
                return self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []

        names = {path.rstrip("/").rpartition("/")[2] for path in self._tried("cannot be listed", listed)}
        return sorted(filter(NAME.fullmatch, names), key=step_of_name)

    def has_manifest(self, name: str) -> bool:
        return self.read_file(name, MANIFEST) is not None

    def manifest(self, name: str) -> dict | None:
        """The manifest of a copy; None if it has none. Raises Damaged if the manifest is damaged."""
        text = self.read_file(name, MANIFEST)
        return None if text is None else parse_manifest(text, f"{self.url}/{name}")

    def manifest_or_error(self, name: str) -> dict:
        """The manifest of a copy. Raises Damaged if it is missing or damaged."""
        manifest = self.manifest(name)
        if manifest is None:
            raise Damaged(f"{self.url}/{name}: has no {MANIFEST}: it is being copied, was cut short, or never existed")
        return manifest

    def read_file(self, name: str, file_name: str) -> bytes | None:
        """The content of a file of a copy; None if it is missing."""

        def read() -> bytes | None:
            try:
                return self._fs.cat_file(self._path(name, file_name))
            except FileNotFoundError:
                return None

        return self._tried("cannot be read", read)

    def put(self, path: Path, manifest: Mapping) -> None:
        """Copy a checkpoint from the disk. Files of an equal copy are copied only if their size differs.

        Raises Damaged on a checksum mismatch, and OSError if a file cannot be read.
        """
        text, name, files = read_regular(path / MANIFEST), checkpoint_name(manifest["step"]), manifest["files"]
        old = self.read_file(name, MANIFEST)
        if old == text:
            sizes = self.sizes(name)
            files = {file: entry for file, entry in files.items() if sizes.get(file) != entry["bytes"]}
        if old is not None and files:
            self.disown(name)

        def put_file(file: str) -> None:
            target = self._path(name, file)
            self._tried("cannot be written", lambda: self._write(target, path / file, files[file]))

        if files:
            _of_all(put_file, files)
            self._tried("cannot be written", lambda: self._fs.pipe_file(self._path(name, MANIFEST), text))

    def fetch(self, name: str, manifest: Mapping, folder: Path) -> list[str]:
        """Copy the files of a checkpoint into an empty folder, the manifest last. Returns problems of damaged files.

        Raises OSError if the folder cannot be written.
        """
        if found := self._strange_names(name, manifest):
            return found

        def fetch_file(file_name: str) -> str:
            with writing(folder / file_name) as target:
                problem = self._problem_of_file(name, file_name, manifest["files"][file_name], target)
                target.flush()
                os.fsync(target.fileno())
            return problem

        problems = _of_all(fetch_file, manifest["files"])
        if not problems:
            replace_file(folder / MANIFEST, self.read_file(name, MANIFEST) or b"")
        return problems

    def problems_of(self, name: str) -> list[str]:
        """The problems of a copy; none if every file exists and has its sha256. Reads every byte."""
        try:
            manifest = self.manifest_or_error(name)
        except Damaged as error:
            return list(error.problems)
        files = manifest["files"]
        return self._strange_names(name, manifest) or _of_all(
            lambda file_name: self._problem_of_file(name, file_name, files[file_name], None), files
        )

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of a copy, by name."""
        listed = self._tried("cannot be listed", lambda: self._fs.ls(self._path(name), detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}

    def saved_at(self, name: str) -> float:
        """The time at which a copy was finished, in seconds since 1970."""
        return self._tried("cannot be read", lambda: self._fs.modified(self._path(name, MANIFEST))).timestamp()

    def disown(self, name: str) -> None:
        """Delete the manifest of a copy, so that the copy no longer counts."""

        def remove_manifest() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name, MANIFEST))

        self._tried("cannot be changed", remove_manifest)

    def remove(self, name: str) -> None:
        self.disown(name)

        def remove_files() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm(self._path(name), recursive=True)

        self._tried("cannot be changed", remove_files)

    def prune(self, keep: RetentionPolicy, scores: Mapping[int, Mapping[str, float]]) -> None:
        """Remove the copies that `keep` does not keep, and the files of incomplete copies.

        Copies that a start would not use, such as renamed ones, stay and do not count: if a copy of step 10 had the
        name of step 99, it would take the place of all real ones.
        """
        whole: list[str] = []
        incomplete: list[str] = []
        for name in self.names():
            with suppress(Damaged, Unusable):
                (whole if self.manifest(name) else incomplete).append(name)
        kept = steps_to_keep([step_of_name(name) for name in whole], keep, scores)
        for name in (*incomplete, *(name for name in whole if step_of_name(name) not in kept)):
            self.remove(name)

    def probe(self) -> None:
        """Write a small object, read it and remove it. The folder for the copies of runs must exist: if its disk is not
        mounted, a new folder would be on another disk."""
        folder = Path(self._root).parents[1]
        if self.url.startswith(("file:", "local:")) and not is_dir(folder):
            problem = f"{folder}: there is no such folder; make it, or mount the disk that it is on"
            raise StoreError(problem, exit_code=EXIT_USER_ERROR)
        path, content = self._path(f".probe-{uuid.uuid4().hex}"), b"bfsys may write here"
        self._tried("cannot be written", lambda: self._fs.pipe_file(path, content))
        if self._tried("cannot be read", lambda: self._fs.cat_file(path)) != content:
            raise StoreError(f"{self.url}: returns other bytes than were written", exit_code=EXIT_USER_ERROR)
        self._tried("objects cannot be removed", lambda: self._fs.rm_file(path))

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _write(self, path: str, source: Path, entry: Mapping) -> None:
        """Upload a file. The upload is aborted if the file's sha256 is not that of `entry`."""
        digest = hashlib.sha256()
        target = self._fs.open(path, "wb", block_size=max(BLOCK_BYTES, entry["bytes"] // MOST_BLOCKS + 1))
        try:
            with _on_disk():
                file = open_regular(source)
            with file:
                while part := _read(file):
                    digest.update(part)
                    target.write(part)
                    self.moved = time.monotonic()
            if digest.hexdigest() != entry["sha256"]:
                raise Damaged(f"{checksum_mismatch(source)}; it is not copied")
            target.close()
        except BaseException:
            with suppress(Exception):  # a local file has nothing to discard
                target.discard()  # parts of an unfinished upload would stay in the store, and cost money
                target.closed = True  # otherwise the destructor would write the buffered bytes
            raise
        self.moved = time.monotonic()

    def _problem_of_file(self, name: str, file_name: str, entry: Mapping, target: BinaryIO | None) -> str:
        """Read a file, and write it to `target` if that is given. Returns its problem, or "" if it matches `entry`."""

        def read() -> str:
            digest, size_bytes = hashlib.sha256(), 0
            if target:
                with _on_disk():
                    target.seek(0)
                    target.truncate()
            with self._fs.open(self._path(name, file_name), "rb", block_size=BLOCK_BYTES, cache_type="none") as file:
                while part := file.read(BLOCK_BYTES):
                    self.moved = time.monotonic()
                    digest.update(part)
                    size_bytes += len(part)
                    if target:
                        with _on_disk():
                            target.write(part)
            is_same = {"bytes": size_bytes, "sha256": digest.hexdigest()} == dict(entry)
            return "" if is_same else f"{self.url}/{name}/{file_name}: checksum mismatch, the file is corrupt"

        def read_if_there() -> str:
            try:
                return read()
            except FileNotFoundError:
                return f"{self.url}/{name}/{file_name}: is missing"

        return self._tried("cannot be read", read_if_there)

    def _strange_names(self, name: str, manifest: Mapping) -> list[str]:
        """Problems of file names in a manifest. A foreign manifest must not name files outside its folder."""
        strange = [file for file in manifest["files"] if "/" in file or "\0" in file or file.startswith(".")]
        return [
            f"{self.url}/{name}/{MANIFEST}: names {file!r}, which is not a file of a checkpoint" for file in strange
        ]

    def _tried(self, what_fails: str, act: Callable[[], T]) -> T:
        """The result of `act`, with retries on errors that may be transient."""
        for pause_s in (*self._pauses_s, None):
            try:
                result = act()
                self.moved = time.monotonic()
                return result
            except _DiskError as error:
                raise error.error from None
            except UserError:
                raise
            except Exception as error:  # each library has its own errors
                is_permanent = (
                    isinstance(error, PERMANENT_ERRORS)
                    or getattr(error, "errno", None) in PERMANENT_ERRNOS
                    or type(error).__name__ in ERRORS_OF_SETTINGS
                    or _s3_code(error) in ERRORS_OF_SETTINGS
                )
                problem = f"{self.url}: {what_fails}: {hide_in(_reason(error))}"
                if is_permanent or pause_s is None:
                    raise StoreError(problem, exit_code=EXIT_USER_ERROR if is_permanent else EXIT_CRASHED) from error
                self._say(f"{problem}; trying again in {pause_s:g} s")
                time.sleep(pause_s)
        raise AssertionError("the last try raises")


def _read(file: BinaryIO) -> bytes:
    with _on_disk():
        return file.read(BLOCK_BYTES)


def _s3_code(error: Exception) -> str | None:
    """The code of S3's answer, which s3fs keeps in the cause of its errors; None for other errors."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    text = str(error) or getattr(error, "strerror", None) or type(error).__name__
    return f"{kind}{' '.join(text.split())}"


def _of_all(act: Callable[[str], T], names: Mapping[str, object]) -> list[T]:
    """Call `act` for each name, FILES_AT_A_TIME at once. Returns the results that are not empty; raises the first
    error."""
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        futures = [pool.submit(act, name) for name in names]
        try:
            return [result for future in as_completed(futures) if (result := future.result())]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
