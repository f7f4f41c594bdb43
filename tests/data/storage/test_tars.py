"""Tars that others made: a member is read as it is, or the tar is refused with the member's name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from bfsys.data.storage.tars import BLOCK_BYTES, read_shard
from bfsys.errors import UserError

CONTENT = b"0123456789"


def regular(name: str, content: bytes = CONTENT, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], layout: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=layout) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if content else None)
    return path


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read_shard(path)
    return caught.value.problems


def set_fields(path: Path, name: str, fields: dict[int, bytes]) -> None:
    """Overwrite bytes in a member's header, and correct its checksum."""
    data = bytearray(path.read_bytes())
    start = data.index(name.encode() + b"\0")
    for position, value in fields.items():
        data[start + position : start + position + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK_BYTES])
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["./cat/a.bin", "cat//a.bin", "/cat/a.bin", "./././cat/./a.bin", "cat/a.bin/"])
@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_those_that_tar_extracts(tmp_path: Path, name: str, layout: int) -> None:
    index = read_shard(tar_of(tmp_path / "x.tar", regular(name), regular("cat/a.cls", b"1"), layout=layout))
    assert index.key_list() == ["cat/a"]


def test_names_keep_backslashes_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    names = ["cat\\a", "caf\udce9/b", "n" * 300]
    members = [m for name in names for m in (regular(f"{name}.bin"), regular(f"{name}.cls", b"0"))]
    index = read_shard(tar_of(tmp_path / "x.tar", *members, layout=tarfile.GNU_FORMAT))
    assert index.keys == b"cat\\a" + b"caf\xe9/b" + b"n" * 300


@pytest.mark.parametrize("name", ["../cat/a.bin", "cat/../dog/a.bin", "cat/.."])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", regular(name), regular("b.bin"), regular("b.cls", b"0")))
    assert f"x.tar: member {name!r} has '..' in its name" in problem


@pytest.mark.parametrize("name", ["cat/a\n.bin", "cat\t/a.bin", "a.bin\0cls"])
def test_a_name_with_a_control_character_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", regular("a", pax_headers={"path": name})))
    assert f"member {name!r} has a line break or another control character" in problem


def test_a_backup_by_gnu_tar_has_its_names(tmp_path: Path) -> None:
    """The header of an incremental backup has times where other formats have the beginning of the name."""
    folder, _ = regular("cat/", b"", type=b"D")
    members = (folder, b""), regular("cat/a.bin"), regular("cat/a.cls", b"1")
    path = tar_of(tmp_path / "x.tar", *members, layout=tarfile.GNU_FORMAT)
    set_fields(path, "cat/a.bin", {345: b"15302043625\0"})
    assert read_shard(path).key_list() == ["cat/a"]


def test_folders_labels_and_contiguous_files_are_read(tmp_path: Path) -> None:
    folder, label = tarfile.TarInfo("v1.0"), tarfile.TarInfo("volume.bin")
    folder.type, label.type = tarfile.DIRTYPE, b"V"
    contiguous = regular("v1.0/a.bin", type=tarfile.CONTTYPE)
    path = tar_of(
        tmp_path / "x.tar", (label, b""), (folder, b""), (folder, b""), contiguous, regular("v1.0/a.cls", b"3")
    )
    index = read_shard(path)
    assert index.key_list() == ["v1.0/a"]
    row = index.samples[0]
    assert path.read_bytes()[row["offset"] : row["offset"] + row["length"]] == CONTENT


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.LNKTYPE, "is a hard link"),
        (tarfile.SYMTYPE, "is a symbolic link"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.BLKTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a pipe"),
        (b"M", "is the rest of a file that begins on another volume"),
        (b"Q", "is of the unknown type b'Q'"),
    ],
)
def test_members_that_are_not_plain_files_are_refused(tmp_path: Path, kind: bytes, said: str) -> None:
    odd = regular("b.bin", b"", type=kind, linkname="a.bin")
    path = tar_of(tmp_path / "x.tar", regular("a.bin"), odd, regular("a.cls", b"0"), regular("c.cls", b"0"))
    assert [said in problem and "x.tar: member 'b.bin'" in problem for problem in problems_of(path)] == [True]


SPARSE_HEADERS = {
    "0.0": {
        "GNU.sparse.size": "5000",
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.offset": "0",
        "GNU.sparse.numbytes": "9",
    },
    "0.1": {"GNU.sparse.size": "5000", "GNU.sparse.map": "0,10", "GNU.sparse.name": "b.bin"},
    "1.0": {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "b.bin",
        "GNU.sparse.realsize": "5000",
    },
    "unknown": {"GNU.sparse.major": "9", "GNU.sparse.minor": "0"},
    "star": {"SCHILY.realsize": "5000"},
}


@pytest.mark.parametrize("version", SPARSE_HEADERS)
def test_sparse_files_by_pax_headers_are_refused(tmp_path: Path, version: str) -> None:
    content = b"1\n0\n10\n".ljust(BLOCK_BYTES, b"\0") + CONTENT
    sparse = regular("b.bin", content, pax_headers=SPARSE_HEADERS[version])
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", b"0"), sparse))
    assert "member 'b.bin' is a sparse file" in problem


def test_old_sparse_files_of_gnu_tar_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", regular("b.bin"), regular("b.cls", b"0"), layout=tarfile.GNU_FORMAT)
    octal = [b"%011o\0" % value for value in (0, 10, 5000)]
    set_fields(path, "b.bin", {156: b"S", 386: octal[0] + octal[1], 483: octal[2]})
    (problem,) = problems_of(path)
    assert "member 'b.bin' is a sparse file" in problem


def test_the_rest_of_a_file_by_pax_headers_is_refused(tmp_path: Path) -> None:
    rest = regular("b.bin", pax_headers={"GNU.volume.offset": "5000", "GNU.volume.size": "10"})
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", rest))
    assert "member 'b.bin' is the rest of a file that begins on another volume" in problem


def test_sizes_that_disagree_are_refused(tmp_path: Path) -> None:
    wrong = regular("b.bin", pax_headers={"size": "7"})
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", regular("a.bin"), wrong, regular("c.bin")))
    assert "member 'b.bin' has 10 bytes by its header and 7 by its pax header" in problem


@pytest.mark.parametrize(("size", "said"), [(b"\xff" * 12, "-1"), (b"%011o\0" % 30_000, "30,000")])
def test_an_invalid_size_is_refused_by_name(tmp_path: Path, size: bytes, said: str) -> None:
    path = tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", b"0"), regular("b.bin"))
    set_fields(path, "b.bin", {124: size})
    (problem,) = problems_of(path)
    # Recent releases of Python read no header with a negative size.
    assert f"member 'b.bin' has {said} bytes by its header" in problem or (said == "-1" and "header at byte" in problem)


@pytest.mark.parametrize("names", [("./a.bin", "a.bin"), ("a.bin", "a.BIN"), ("a.json", "a.json")])
def test_two_members_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tar_of(tmp_path / "x.tar", *map(regular, names), regular("a.cls", b"0"))
    (problem,) = problems_of(path)
    assert f"member {names[1]!r} occurs twice" in problem


def test_a_size_that_no_computer_has_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", regular("é.bin"), regular("é.cls", b"0"))  # a pax header comes first
    set_fields(path, "././@PaxHeader", {124: b"\x80" + b"\xff" * 11})
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: cannot be read as a tar (")
    assert "\n" not in problem


def test_two_class_numbers_of_one_sample_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", b"0"), regular("./a.CLS", b"1"))
    (problem,) = problems_of(path)
    assert "member './a.CLS' occurs twice" in problem


@pytest.mark.parametrize("text", ["0", "7", "7\n", " 7 \r\n", "\ufeff7\n", "999999999"])
def test_class_numbers(tmp_path: Path, text: str) -> None:
    index = read_shard(tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", text.encode())))
    assert index.samples["label"].tolist() == [int(text.strip("\ufeff"))]


@pytest.mark.parametrize(
    "text", ["1.0", "-1", "01 ", "1e3", "0x1", "٣", "²", "", " ", "1 2", "1000000000", "+1", "1_0"]
)
def test_invalid_class_numbers_are_named(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", text.encode())))
    assert f"a.cls holds {text.encode()!r}; it must hold a number from 0 to 999999999" in problem


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.bin", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("compress", "remedy"),
    [
        (gzip.compress, "(gzip), shards must not be: mv {0} {0}.gz && gunzip {0}.gz"),
        (bz2.compress, "(bzip2), shards must not be: mv {0} {0}.bz2 && bunzip2 {0}.bz2"),
        (lzma.compress, "(xz), shards must not be: mv {0} {0}.xz && unxz {0}.xz"),
        (b"\x28\xb5\x2f\xfd".__add__, "(zstd), shards must not be: mv {0} {0}.zst && unzstd {0}.zst"),
        (zipped, "(zip), shards must not be: unzip {0} and pack the files with bfsys pack"),
    ],
)
def test_a_compressed_archive_is_known_by_its_first_bytes(tmp_path: Path, compress, remedy: str) -> None:
    path = tar_of(tmp_path / "x.tar", regular("a.bin"), regular("a.cls", b"0"))
    path.write_bytes(compress(path.read_bytes()))
    assert problems_of(path) == (f"{path}: is compressed {remedy.format(path)}",)


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    assert problems_of(tmp_path / "x.tar") == (
        f"{tmp_path / 'x.tar'}: cannot be read (is not a regular file, but a pipe or a device); "
        "fetch or pack this shard again",
    )
