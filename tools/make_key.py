"""Make a key file: `python tools/make_key.py KEYFILE`, as `bfsys make-key`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("make-key", "tools/make_key.py")
