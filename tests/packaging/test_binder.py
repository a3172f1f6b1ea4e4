"""The notebooks of the live demonstration run from their first cells to their last, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_gpupool.client import discovery
from jupyter_gpupool.client.http import PoolClient

pytest.importorskip("torch", reason="the notebooks train with PyTorch")

Open = Callable[..., "Notebook"]


class Notebook:
    """One that is open: its kernel runs until the test ends."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.notebook = nbformat.read(path, as_version=4)
        self._client = NotebookClient(
            self.notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
        )
        self._kernel = self._client.setup_kernel()
        self._kernel.__enter__()
        self._next = 0

    def run(self, until: str = "") -> str:
        """Run cells, up to the first whose source begins so; what they show."""
        said = []
        for number, cell in enumerate(self.notebook.cells):
            if number < self._next or cell.cell_type != "code":
                continue
            if until and cell.source.startswith(until):
                break
            self._next = number + 1
            self._client.execute_cell(cell, number)
            for output in cell.outputs:
                said.append(output.get("text") or output.get("data", {}).get("text/plain") or "")
                said.append("\n".join(output.get("traceback", [])))
        return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(said))

    def close(self) -> None:
        self._kernel.__exit__(None, None, None)


@pytest.fixture
def open_notebook(
    project_root: Path,
    tmp_path: Path,
    jupyter_home: Path,
    eventually: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Open]:
    # A kernel's start waits for its worker, however long PyTorch takes to import.
    monkeypatch.setattr("jupyter_gpupool.jupyter.kernel_lease._OPTIONAL_WAIT_S", 300.0)
    with open(os.devnull, "w") as quiet:
        pool = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_gpupool", "server", "--port=0", "--emulate"),
                "--LocalEngine.attach_timeout_s=60",
            ],
            stderr=quiet,
        )
    opened: list[Notebook] = []

    def start(name: str) -> Notebook:
        opened.append(Notebook(project_root / "binder" / f"{name}.ipynb", tmp_path))
        return opened[-1]

    try:
        eventually(discovery.find, "a pool runs, as JupyterLab's does")
        yield start
        for notebook in opened:
            notebook.close()
        address = discovery.find()
        assert address is not None
        with PoolClient(address.url, address.token, timeout_s=300) as client:
            eventually(lambda: not client.leases(), "a notebook that is closed leaves no lease")
    finally:
        pool.terminate()
        pool.wait(300)


def test_attach(open_notebook: Open) -> None:
    said = open_notebook("attach").run()
    assert "cuda:1  Tesla V100-PCIE-32GB (emulated)  26008 MiB" in said
    assert "of the training digits are read correctly" in said
    assert "Tried to allocate" in said


def test_mnist_on_the_slice_that_the_provisioner_lent(open_notebook: Open) -> None:
    notebook = open_notebook("mnist")
    assert notebook.notebook.metadata.kernelspec.name == "gpupool-python3"
    said = notebook.run()
    assert re.search(r"Active for .*, lease .*\ndevice .*\ncuda:0 .* 16255 +32510", said), said
    assert "('Tesla V100-PCIE-32GB (emulated)', 16255)" in said
    losses = [float(x) for x in re.findall(r"Loss: ([0-9.]+)", said)]
    assert len(losses) > 3 and losses[-1] < losses[0] / 2, said
    assert "Released; moved to the CPU: " in said and "(model, result)" in said
    assert "(device(type='cpu'), device(type='cpu'), False)" in said


def test_two_notebooks_share_a_gpu(open_notebook: Open) -> None:
    first, second = open_notebook("share-a"), open_notebook("share-b")
    assert "13004 MiB: cuda:0" in first.run(until="%gpupool gpus")
    said = second.run(until="%gpupool release")
    both = re.search(r"0 +Tesla V100-PCIE-32GB \(emulated\) +32510 +3251 +(.*)", said)
    assert both and "13004 MiB" in both[1] and "this notebook 16255 MiB" in both[1], said
    assert "total capacity of 15.87 GiB" in said
    said = first.run()
    assert "this notebook 13004 MiB" in said and "total capacity of 12.70 GiB" in said
    assert "Released" in said and "Released" in second.run()


def test_resizing(open_notebook: Open) -> None:
    said = open_notebook("resize").run()
    assert "Tried to allocate 200.00 MiB" in said and "\n75.0" in said
    assert re.findall(r", (\d+) MiB: cuda:0", said) == ["200", "400", "100"]
    assert "UsageError: cuda:0 has 300 MiB in use and cannot be made smaller" in said
    assert "Released; moved to the CPU: 1 tensor, 100.00 MiB (batch)" in said
    assert "(device(type='cpu'), True, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])" in said


def test_a_queue(open_notebook: Open) -> None:
    said = open_notebook("queue").run()
    assert said.count(" 32510 MiB\n") == 2, "somebody has both GPUs"
    assert "UsageError: 1 GPU with 0.5 of the memory each cannot be granted now" in said
    assert "Traceback" not in said
    assert "position 1; meanwhile, 6 * 7 = 42" in said
    assert "Attached: 1 × Tesla V100-PCIE-32GB (emulated), 16255 MiB: cuda:0" in said
    assert "8127 MiB: cuda:0" in said and "[2.0, 2.0, 2.0]" in said
