"""The notes of packing on files that it leaves out, classes that cannot be learned, and peculiarities of files."""

import io
import unicodedata

import pytest
from PIL import Image

from bfsys.data.storage.description import read_description
from bfsys.data.storage.shards import open_split
from bfsys.inputs import files_in
from tests.commands.packing_helpers import contents, make_files, make_tree, pack, png_bytes, problems_of

OF_SYSTEM = [
    *("Thumbs.db", "THUMBS.DB", "ehthumbs.db", "Desktop.ini", "Icon\r", ".DS_Store", "._a", "~$a.docx"),
    *("@eaDir/a/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a", "$RECYCLE.BIN/a", "System Volume Information/a"),
    *("#recycle/a", "lost+found/a", "a.jpg:Zone.Identifier", "a.jpg@SynoEAStream", "FOUND.000/a"),
    *("a.jpg\uf03aZone.Identifier", "Thumbs.db:encryptable"),
]


@pytest.mark.parametrize("name", OF_SYSTEM)
def test_files_of_the_operating_system_are_not_samples(tmp_path, capsys, name):
    src = make_files(tmp_path / "src", {"cat/a": b"1", f"cat/deep/{name}": b"x", f"dog/{name}": b"x", "dog/a": b"2"})
    assert set(contents(pack(src, tmp_path, "--split", "train"))) == {"cat/a", "dog/a"}
    assert "files and folders left out: 2 of the operating system (cat/deep/" in capsys.readouterr().err


def test_folders_of_the_operating_system_are_not_classes(tmp_path, capsys):
    src = make_files(tmp_path / "src", {"cat/a": b"1", "__MACOSX/a": b"x", "@eaDir/a": b"x", "lost+found/a": b"x"})
    assert open_split(pack(src, tmp_path, "--split", "train"), "train").classes == ("cat",)
    assert "3 of the operating system (@eaDir, __MACOSX, lost+found)" in capsys.readouterr().err


def test_the_notes_of_encode_are_not_named(tmp_path, capsys):
    """Its output may be packed and predicted."""
    src = make_files(tmp_path / "src", {"cat/a": b"1", ".encoded.jsonl": b"x", "cat/.encoded.jsonl": b"x"})
    assert set(contents(pack(src, tmp_path, "--split", "train"))) == {"cat/a"}
    assert files_in(src) == [str(src / "cat" / "a")]
    assert capsys.readouterr().err == ""


def test_left_out_files_are_counted_and_named(tmp_path, capsys):
    files = {f"java/.hidden{i}": b"x" for i in range(4)} | {".net/a": b"x", "loose.bin": b"x", "java/Thumbs.db": b"x"}
    src = make_files(tmp_path / "src", {"java/a": b"1", "perl/a": b"2"} | files)
    pack(src, tmp_path, "--split", "train")
    note = (
        "files and folders left out: 5 hidden (.net, java/.hidden0, java/.hidden1, …), "
        "1 next to the class folders (loose.bin), 1 of the operating system (java/Thumbs.db)\n"
    )
    out, err = capsys.readouterr()
    assert err == f"{src}: {note}"
    assert "left out" not in out


@pytest.mark.parametrize(("splits", "noted"), [(("train", "Test"), True), (("old", "test"), False)])
def test_split_folders_in_class_folders_are_named(tmp_path, capsys, splits, noted):
    files = {f"{word}/{split}/{i}": b"1" for word in ("cat", "dog") for split in splits for i in range(3)}
    pack(make_files(tmp_path / "src", files), tmp_path)
    note = "src: note: the split folders in class folders (cat/Test, cat/train, dog/Test, …) are not used as splits"
    assert (note in capsys.readouterr().err) is noted


def test_files_that_describe_others_are_named(tmp_path, capsys):
    files = {f"{word}/{i}.{end}": b"1" for word in ("cat", "dog") for i in range(2) for end in ("jpg", "JPG.json")}
    files |= {"cat/0.json": b"1", "cat/alone.json": b"1", "dog/1.png": b"1", "dog/notes.txt": b"1"}
    pack(make_files(tmp_path / "src", files), tmp_path)
    assert "1 file may only describe others of the same name (cat/0.json). Each" in capsys.readouterr().err
    pack(make_files(tmp_path / "other", {"cat/0.jpg": b"1", "cat/0.jpg.XMP": b"1", "dog/0.bin": b"1"}), tmp_path)
    assert "(cat/0.jpg.XMP)" in capsys.readouterr().err


def test_files_beside_split_folders_are_named(tmp_path, capsys):
    src = make_files(tmp_path / "src", {"train/cat/a": b"1", "train/labels.csv": b"x", "extra/a": b"x", "note": b"x"})
    pack(src, tmp_path, "--from", "imagefolder")
    err = capsys.readouterr().err
    assert "2 next to the split folders (note, extra), 1 next to the class folders (train/labels.csv)" in err


def test_a_refused_command_says_what_it_left_out(tmp_path, capsys):
    src = make_files(tmp_path / "src", {".net/a": b"1"})
    assert "has no class folders" in problems_of(src, tmp_path / "out")
    assert capsys.readouterr().err == f"{src}: files and folders left out: 1 hidden (.net)\n"


def test_files_of_the_operating_system_in_a_list_are_left_out(tmp_path, capsys):
    lines = b"a\tcat\nx/Thumbs.db\tcat\n.b\tcat\nx/@eaDir/a.jpg/t.jpg\tcat"
    make_files(tmp_path, {"a": b"1", ".b": b"2", "list.tsv": lines})
    dataset = pack(tmp_path / "list.tsv", tmp_path / "out", "--from", "filelist", "--split", "train")
    assert set(contents(dataset)) == {"cat/a", "cat/_b"}
    assert "2 of the operating system (x/Thumbs.db, x/@eaDir/a.jpg/t.jpg)" in capsys.readouterr().err


def test_class_names_are_stored_in_normal_form(tmp_path):
    name = unicodedata.normalize("NFD", "Müller")
    dataset = pack(make_files(tmp_path / "src", {f"{name}/a": b"1"}), tmp_path, "--split", "train")
    assert contents(dataset) == {"Müller/a": ("train", "Müller", b"1")}
    (tmp_path / "list.tsv").write_text(f"src/{name}/a\t{name}")
    listed = pack(tmp_path / "list.tsv", tmp_path, "--from", "filelist", "--split", "train", name="listed")
    assert read_description(listed)["classes"] == ["Müller"]


def test_blanks_around_class_names_are_not_stored(tmp_path):
    src = make_files(tmp_path / "src", {"cat /a": b"1", " dog/a": b"2"})
    assert contents(pack(src, tmp_path, "--split", "train")) == {
        "cat/a": ("train", "cat", b"1"),
        "dog/a": ("train", "dog", b"2"),
    }
    (tmp_path / "list.tsv").write_text("src/cat /a\tcat \n")
    listed = pack(tmp_path / "list.tsv", tmp_path, "--from", "filelist", "--split", "train", name="listed")
    assert read_description(listed)["classes"] == ["cat"]
    assert "class ' ' has no visible characters" in problems_of(make_files(tmp_path / "in", {" /a": b"1"}), tmp_path)


def test_classes_without_training_files_are_named(tmp_path, capsys):
    files = {"train/cat/a": b"1", "val/cat/a": b"2", "val/dog/a": b"3", "val/fox/a": b"4"}
    pack(make_files(tmp_path / "src", files), tmp_path)
    out = capsys.readouterr().out
    assert "note: 2 classes are without training files and cannot be learned: dog, fox\n" in out


def test_a_single_class_is_noted(tmp_path, capsys):
    dataset = pack(make_files(tmp_path / "src", {"photos/cat/a": b"1", "photos/dog/a": b"2"}), tmp_path)
    out = capsys.readouterr().out
    assert "pets: 1 class (photos)" in out
    assert "note: one class: there is nothing to learn\n" in out
    assert "notes" not in read_description(dataset)  # it can be derived from the other fields


def test_a_complete_dataset_has_no_notes(tmp_path, capsys):
    dataset = pack(make_tree(tmp_path / "src"), tmp_path)
    assert "note" not in capsys.readouterr().out
    assert "notes" not in read_description(dataset)


def test_peculiarities_of_pictures_are_noted_in_the_dataset(tmp_path, capsys):
    animated, turned = io.BytesIO(), io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 99, 200)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x112] = 6
    frames[0].save(turned, "JPEG", exif=exif)
    files = {f"red/{i}.png": png_bytes(8, 8, i) for i in range(6)}
    files |= {"red/film.gif": animated.getvalue(), "red/t.jpg": turned.getvalue(), "red/u.jpg": turned.getvalue()}
    options = ("--split", "train", "--encoding", "png", "--shard-bytes", "2K")
    dataset = pack(make_files(tmp_path / "src", files), tmp_path, *options)
    assert len(list(dataset.glob("*.tar"))) > 1
    frames_note, orientation_note = read_description(dataset)["notes"]
    assert frames_note.startswith("1 of 9 files have more frames than the first")
    assert frames_note.endswith("; the first is red/film")
    assert orientation_note.startswith("2 of 9 files have an EXIF orientation")
    assert f"  note: {frames_note}\n  note: {orientation_note}\n" in capsys.readouterr().out
