"""Learning curves of runs as a picture, from their metrics.jsonl. TensorBoard shows the same during training.

Each run has a panel. Training is a line (smoothed over a twentieth of the run), and evaluations are dots. If runs have
several sources, each source has a colour.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from bfsys.checkpoint.files import METRICS
from bfsys.errors import UserError, os_errors_as
from bfsys.json_lines import NUMBER, read_json_lines

PANELS_PER_ROW = 4
SMOOTHED = 20  # the smoothing window is 1 / SMOOTHED of the lines


def read(run: Path, score: str, problems: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Read {source or "all": {"train" and "eval": float64 [lines, 2] of step and score}}."""
    try:
        lines = list(read_json_lines(run / METRICS, {"kind": str, "step": int, "sources": dict, score: NUMBER}))
    except OSError as error:
        problems.append(f"{run / METRICS}: cannot be read ({error.strerror})")
        return {}
    found: dict[str, dict[str, list]] = {}
    several = len({name for line in lines for name in line["sources"]}) > 1
    for line in lines:
        parts = line["sources"] if several else {"all": line}
        for name, values in parts.items():
            of_source = found.setdefault(name, {"train": [], "eval": []})
            of_source[line["kind"]].append((line["step"], values[score]))
    if not found:
        problems.append(f"{run}: holds no measurement; give the directory of a run that has begun to train")
    return {
        name: {kind: np.array(points, np.float64).reshape(-1, 2) for kind, points in kinds.items()}
        for name, kinds in found.items()
    }


def draw(curves: dict[Path, dict], score: str, out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    columns = min(PANELS_PER_ROW, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure((3.4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (run, sources) in zip(panels, curves.items(), strict=False):
        for number, (name, kinds) in enumerate(sources.items()):
            colour, label = f"C{number}", "" if name == "all" else f"{name} "
            train, val = kinds["train"], kinds["eval"]
            if len(train):  # an evaluation may come before the first line of training
                width = max(1, len(train) // SMOOTHED)
                means = np.convolve(train[:, 1], np.ones(width) / width, "valid")
                panel.plot(train[width - 1 :, 0], means, color=colour, linewidth=1, label=f"{label}training")
            panel.plot(val[:, 0], val[:, 1], "o-", color=colour, markersize=3, alpha=0.5, label=f"{label}validation")
        panel.set_title(run.name, fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel(score)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
        if score != "loss":
            panel.set_ylim(0, 1)
    for panel in panels[len(curves) :]:
        panel.remove()
    # The warnings say that the font lacks letters of a name.
    with os_errors_as(f"{out}: cannot be written"), warnings.catch_warnings(action="ignore"):
        figure.savefig(out, dpi=110)
