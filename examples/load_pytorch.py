"""Classify files with an exported model and PyTorch, without bfsys.

    bfsys export RUN EXPORT                          # writes EXPORT/model.pt2 and EXPORT/model.json
    python examples/load_pytorch.py EXPORT FILE…

The program takes the bytes of one file, uint8 [n], and gives the probabilities of the classes, float32 [classes].
"""

import json
import logging
import sys
from pathlib import Path

import torch

logging.getLogger("torch.export").setLevel(logging.ERROR)  # it warns with a traceback of what it raises again


def main(export: Path, files: list[Path]) -> int:
    """Print the class of each file. Returns the exit code: 1 if a file has no answer."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    try:
        about = json.loads((export / "model.json").read_text(encoding="utf-8"))
        if about["byte_transforms"]:
            sys.exit(
                f"this model reads bytes after {', '.join(about['byte_transforms'])}; apply them to the files first"
            )
        classes, least_bytes = about["classes"], about["least_bytes"]
        program = torch.export.load(export / "model.pt2").module()
    except Exception as error:  # PyTorch raises all kinds of them
        sys.exit(f"{export}: cannot be used ({error!r}); write it with: bfsys export RUN EXPORT")
    exit_code = 0
    for file in files:
        try:
            content = bytearray(file.read_bytes())
            is_short = len(content) < least_bytes
            problem = f"has {len(content)} bytes; this model needs at least {least_bytes}" if is_short else ""
        except OSError as error:
            problem = error.strerror
        if problem:
            print(f"{file}: {problem}", file=sys.stderr)
            exit_code = 1
            continue
        with torch.no_grad():
            probabilities = program(torch.frombuffer(content, dtype=torch.uint8))
        likeliest = int(probabilities.argmax())
        print(f"{file}: {classes[likeliest]} {100 * probabilities[likeliest]:.1f} %")
    return exit_code


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
