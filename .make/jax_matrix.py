"""Runs the tests of JAX on other releases of it, each in an environment of its own.

    python .make/jax_matrix.py 0.7.2 0.8.3 0.9.2

An environment has that release of jax and jaxlib, about 500 MB; it takes everything else from the one that this script
runs in. What came out goes to benchmarks/jax-matrix.json, release by release; releases of earlier runs stay there.
"""

from __future__ import annotations

import sys

from release_matrix import run_all


def main(words: list[str]) -> int:
    return run_all(
        words,
        "JAX",
        "make jax-matrix JAX='0.7.2 0.8.3 0.9.2'",
        ["tests/jax"],
        lambda release: [f"jax=={release}", f"jaxlib=={release}"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
