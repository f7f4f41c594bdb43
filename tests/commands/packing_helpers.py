"""Files to pack, packing them, and reading the result."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from bfsys.cli import call
from bfsys.commands.inspect import verify
from bfsys.data.storage.shards import open_dataset, open_split
from bfsys.errors import UserError
from tests.conftest import REPOSITORY


def make_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_tree(folder: Path, count: int = 30, size_bytes: int = 300) -> Path:
    names = {f"{'cat' if i % 2 else 'dog'}/{i:03d}.jpg": bytes([i % 256]) * (size_bytes + i) for i in range(count)}
    return make_files(folder, names)


def pack(src: Path, out: Path, *options: str, name: str = "pets") -> Path:
    call("pack", [str(src), str(out), "--name", name, "--workers", "1", *options])
    for split in open_dataset(out / name).splits:
        assert verify(open_split(out / name, split)) == []
    return out / name


def problems_of(src: Path, out: Path, *options: str, name: str = "pets") -> str:
    """Run a command that must fail, and return its message."""
    with pytest.raises(UserError) as error:
        call("pack", [str(src), str(out), "--name", name, "--workers", "1", *options])
    return str(error.value)


def contents(dataset: Path) -> dict[str, tuple[str, str, bytes]]:
    """Split, class and bytes by key."""
    found = {}
    for name in open_dataset(dataset).splits:
        split = open_split(dataset, name)
        tars = [(dataset / shard.file).read_bytes() for shard in split.shards]
        for i, row in enumerate(split.samples):
            data = tars[row["shard"]][row["offset"] :][: row["length"]]
            found[split.key(i)] = (name, split.classes[row["label"]], data)
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_pack(src: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "tools" / "pack.py", src, out, "--name", "pets", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=out.parent)


def png_bytes(width: int, height: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def wav_bytes(seconds: float, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(seconds * rate_hz)), rate_hz, format="WAV")
    return file.getvalue()
