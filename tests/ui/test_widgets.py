"""Picker and Monitor in JupyterLab: by the mouse, and after the page has been loaded again."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Page, expect

from ..support.browser import run_cell

pytest.importorskip("torch", reason="slices are for PyTorch programs")

CELL = """\
import jupyter_gpupool
picker, monitor = jupyter_gpupool.Picker(num_gpus=1, partial=0.8), jupyter_gpupool.Monitor()
display(picker, monitor)
"""


def test_a_slice_by_the_mouse_and_a_page_that_is_loaded_again(page: Page, lab: str, tmp_path: Path) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CELL)], metadata=kernel), tmp_path / "pick.ipynb")
    page.goto(lab.replace("/lab?", "/lab/tree/pick.ipynb?"))
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    run_cell(page, cell)
    output = page.locator(".jp-Notebook .jp-OutputArea").first
    expect(output).to_contain_text("1 × 26008 MiB, emulated: free now (2 of 2 GPUs have that much free)")
    expect(output.get_by_role("button", name="Release")).to_be_disabled()
    output.get_by_role("button", name="Request GPUs").click()
    expect(output).to_contain_text("This notebook has 1 × Tesla V100-PCIE-32GB (emulated), 26008 MiB: cuda:0")
    expect(output.get_by_role("img", name="Utilization in the last")).to_be_visible()
    expect(output).to_contain_text("0 of 26008 MiB used")

    page.keyboard.press("Control+s")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    page.reload()
    output = page.locator(".jp-Notebook .jp-OutputArea").first
    expect(output).to_contain_text("This notebook has 1 × Tesla V100-PCIE-32GB (emulated), 26008 MiB: cuda:0")
    output.get_by_role("button", name="Release").click()
    expect(output).to_contain_text("This notebook has no GPU slices")
    expect(output.get_by_role("button", name="Release")).to_be_disabled()
