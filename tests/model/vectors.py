"""Numbers of the published ByteFormer (CoreNet), and its names for the weights.

The numbers lie beside the repository, in shared/corenet_vectors, or where BFSYS_CORENET_VECTORS says; tests
that want them are marked with `needs_vectors` and skip where there are none. What each array is stands in
the folder's manifest.json. The arrays are not part of the repository: they are 7 MB of derived data, and
the reference in reference.py, which is held against them, says the same to everyone who has none.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bfsys.import_corenet import to_bfsys
from tests.conftest import REPOSITORY
from tests.model.reference import PAD, ReferenceConfig

FOLDER = Path(os.environ.get("BFSYS_CORENET_VECTORS") or REPOSITORY.parent / "shared" / "corenet_vectors")
FILES = ("s_k8_w16", "s_k32_w128", "s_k4_w32_shift64", "s_k6_nods")
CASES = (
    "tiny_lengths",
    "one_token_batch",
    "window_minus1_0_plus1",
    "two_windows_around",
    "no_padding_equal",
    "tail_longer_than_window",
    "all_padded_tail",
    "odd_counts",
)
WITH_GRADIENTS = (
    ("window_minus1_0_plus1", "released"),
    ("tail_longer_than_window", "released"),
    ("tail_longer_than_window", "intended"),
)

needs_vectors = pytest.mark.skipif(
    not (FOLDER / "manifest.json").is_file(),
    reason=f"no published numbers in {FOLDER} (set BFSYS_CORENET_VECTORS to their folder)",
)


@dataclass(frozen=True)
class Vectors:
    """A file with one set of weights and several batches."""

    config: ReferenceConfig
    arrays: Mapping[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose names begin with `prefix`, by the rest of their names."""
        return {name[len(prefix) :]: a for name, a in self.arrays.items() if name.startswith(prefix)}

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """New copies of the weights by CoreNet's names."""
        return {name: a.to(dtype, copy=True) for name, a in self.under("param/").items()}

    def x(self, case: str) -> Tensor:
        """int64 [B, L], padded on the right with -1."""
        return self.arrays[f"{case}/x"].to(torch.int64)

    def files(self, case: str) -> list[bytes]:
        return [bytes(row[row != PAD].tolist()) for row in self.x(case)]


@cache
def load(name: str) -> Vectors:
    made = json.loads((FOLDER / "manifest.json").read_text())["files"][f"{name}.npz"]["config"]
    config = ReferenceConfig(
        dim=made["dim"],
        heads=made["heads"],
        kernel=made["k"],
        window=made["window"],
        shifts=tuple(made["shifts"]),
        merge=tuple(made["downsample"]),
        max_tokens=made["max_tokens"],
        classes=made["n_classes"],
    )
    with np.load(FOLDER / f"{name}.npz") as file:
        return Vectors(config, {key: torch.from_numpy(file[key]) for key in file.files})


def load_corenet(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights by CoreNet's names into a bfsys model."""
    model.load_state_dict(to_bfsys(weights))
