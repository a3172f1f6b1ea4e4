"""Run a public script, or the code of a notebook, that uses JAX, so that two runs of it can be compared.

Python's and NumPy's generators, from which scripts draw data and Keras its seeds, start with the same seed.

``--digest EXPRESSION``: print a hash of the bits of these arrays once the script has ended, for a script that prints
too few figures. ``--keras-mnist FILE``: what ``keras.datasets.mnist.load_data`` returns.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import random
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np


def serve_mnist(file: Path) -> None:
    from keras.datasets import mnist

    found = np.load(file)
    parts = [(found[f"x_{part}"], found[f"y_{part}"]) for part in ("train", "test")]
    mnist.load_data = lambda *path: tuple(parts)


def code(notebook: Path) -> str:
    """Return the code of a notebook's cells, without the lines that are for IPython."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def run(script: Path) -> dict[str, Any]:
    """Run it as the main module, and return its names."""
    if script.suffix != ".ipynb":
        return runpy.run_path(str(script), run_name="__main__")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # where classes of a notebook say that they are
    exec(compile(code(script), str(script), "exec"), module.__dict__)
    return module.__dict__


def digest(arrays: Any) -> str:
    """Return how many arrays a tree has, and a hash of all their bits."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays) if hasattr(leaf, "dtype")]
    bits = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves))
    return f"{len(leaves)} arrays, {bits.hexdigest()}"


def report_programs() -> None:
    """Say how many programs the slices have of this process: the proof that the script used them."""
    if registration := sys.modules.get("jupyter_gpupool.jax.client.registration"):
        plugin = registration._plugin
        print(f"programs on the slices: {len(plugin.programs) if plugin else 0}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digest", default="")
    parser.add_argument("--keras-mnist", type=Path)
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    atexit.register(report_programs)
    random.seed(0)
    np.random.seed(0)
    if options.keras_mnist:
        serve_mnist(options.keras_mnist)
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)
    names = run(options.script)
    if options.digest:
        print(f"digest: {digest(eval(options.digest, dict(names)))}")


if __name__ == "__main__":
    main()
