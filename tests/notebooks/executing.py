"""Runs a notebook as a reader does, in a folder of its own."""

import base64
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path, folder, claims=""):
    """Run the cells, and after them `claims` in the same kernel; the notebook with its outputs is returned."""
    notebook = nbformat.read(path, as_version=4)
    if claims:
        notebook.cells.append(nbformat.v4.new_code_cell(claims))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def figures(notebook):
    """The pictures of the cells whose metadata name them: name -> PNG."""
    named = {cell.metadata["figure"]: cell.outputs for cell in notebook.cells if "figure" in cell.metadata}
    return {name: next(_pictures(outputs)) for name, outputs in named.items()}


def _pictures(outputs):
    for output in outputs:
        if "image/png" in output.get("data", {}):
            yield base64.b64decode(output.data["image/png"])
