"""The notebook of the live demonstration runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient


def test_the_notebook_runs(project_root: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(project_root / "binder" / "attach.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert said.count("26008 MiB") == 2, said
    assert "of the training digits are read correctly" in said
    assert "Tried to allocate" in said
