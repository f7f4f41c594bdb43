"""Import CoreNet's weights: `python tools/import_corenet.py WEIGHTS.pt OUT`, as `bfsys import-corenet`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from bfsys.start import main

    main("import-corenet", "tools/import_corenet.py")
