"""Draw learning curves of runs as a picture, from their metrics.jsonl (TensorBoard shows the same during training).

    python tools/bench/plot_runs.py curves.png runs/joint runs/image_alone --score top1

bfsys/curves.py describes the picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

from bfsys.curves import draw, read
from bfsys.errors import UserError, run_command, summary_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--score", choices=("top1", "top5", "loss"), default="top1")
    args = parser.parse_args(arguments)
    problems: list[str] = []
    curves = {run: read(run, args.score, problems) for run in args.runs}
    if problems:
        raise UserError(*problems)
    draw(curves, args.score, args.out)
    print(args.out)


if __name__ == "__main__":
    run_command(main, output_is_optional=True)
