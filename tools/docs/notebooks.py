"""The notebooks of docs/notebooks: executed, and as pages of the site.

They are stored without outputs, so a change of the text is a small diff, and pictures never differ from the code.
Rejected alternative: mkdocs-jupyter, which adds 700 kB of styles to each page and does not check the links in
notebooks.
"""

from __future__ import annotations

import functools
import os

import nbclient
import nbformat

CELL_TIMEOUT_S = 1800


def execute(text: str) -> nbformat.NotebookNode:
    """Execute a notebook on the CPU, and return it with its outputs.

    Raises CellExecutionError if a cell fails, and CellTimeoutError after CELL_TIMEOUT_S seconds in a cell.
    """
    notebook = nbformat.reads(text, as_version=4)
    # One thread, since several are much slower if other processes use the cores.
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, startup_timeout=CELL_TIMEOUT_S, coalesce_streams=True
    )
    client.execute(env=on_cpu)
    return notebook


@functools.cache  # `mkdocs serve` builds the site again after each change of a file
def page_of(name: str, text: str) -> tuple[str, dict[str, bytes]]:
    """Execute the notebook `name`. Returns Markdown, and pictures by their path relative to the page."""
    import nbconvert  # only the site needs it

    names = {"unique_key": name, "output_files_dir": f"{name}_files"}
    markdown, resources = nbconvert.MarkdownExporter().from_notebook_node(execute(text), names)
    return markdown, resources["outputs"]
