"""Runs the device's tests on other releases of PyTorch, each in an environment of its own.

    python .make/torch_matrix.py 2.14.1 2.15.0

An environment has that PyTorch, and libraries that are built on it; it takes everything else from the one that this
script runs in. Most releases come as builds for CUDA of several gigabytes, so a release is skipped where the disk has
less than MIN_FREE_GIB left. With two releases, it also lets clients of three use one server at once.
What came out goes to benchmarks/torch-matrix.json, release by release; releases of earlier runs stay there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from release_matrix import ROOT, run_all

#: What runs on each release: the device, the client's API, and the public example on a lease.
TESTS = ("tests/pytorch", "tests/test_lease.py", "tests/examples", "tests/releases/test_trainer.py")
#: What runs once there are two, with the interpreter that this script runs in.
TOGETHER = "tests/releases/test_three_clients.py"
#: What is installed beside each release: torchvision has operators of its own, transformers has the Trainer.
BESIDE = ("torchvision", "transformers", "accelerate")
#: An unpacked build for CUDA with what it depends on takes about 6 GiB, and as much again while it is installed.
MIN_FREE_GIB = 14


def without_room() -> str:
    """Why there is no room for another release; empty if there is."""
    free_gib = shutil.disk_usage(ROOT).free >> 30
    if free_gib >= MIN_FREE_GIB:
        return ""
    return f"{free_gib} GiB are free on this disk, and it takes up to {MIN_FREE_GIB}"


def main(words: list[str]) -> int:
    code = run_all(
        words,
        "PyTorch",
        "make torch-matrix TORCH='2.14.1 2.15.0'",
        ["-n", "2", "--dist", "loadfile", *TESTS],
        lambda release: [f"torch=={release}", *BESIDE],
        without_room,
    )
    if code != 2 and sum((folder / ".ready").exists() for folder in (ROOT / ".torch-matrix").glob("*")) >= 2:
        print("Three clients of different releases at once", flush=True)
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", TOGETHER], cwd=ROOT, check=False)
        code = code or int(bool(done.returncode))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
