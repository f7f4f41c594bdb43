"""The notebooks of the documentation run to their end, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = REPOSITORY / "docs" / "notebooks"
SLOW = {"fit_and_explain": [pytest.mark.slow, pytest.mark.timeout(3600)]}  # this notebook trains


def notebooks() -> list:
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    return [pytest.param(path, id=path.stem, marks=SLOW.get(path.stem, [])) for path in paths]


@pytest.fixture(autouse=True)
def _files_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write no history into the home folder, where other kernels may lock it."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.mark.parametrize("path", notebooks())
def test_a_notebook_runs_to_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.docs.notebooks import execute

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    outputs = [output for cell in execute(path.read_text()).cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_cell_that_fails_is_an_error() -> None:
    from tools.docs.notebooks import execute

    notebook = json.loads((NOTEBOOKS / "data_plan.ipynb").read_text())
    notebook["cells"] = [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [],
                          "source": "raise ValueError('no such file')"}]  # fmt: skip
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no such file"):
        execute(json.dumps(notebook))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), f"clear the outputs: jupyter nbconvert --clear-output --inplace {path}"
        assert cell.get("execution_count") is None
