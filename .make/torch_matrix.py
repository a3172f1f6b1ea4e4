"""Runs the device's tests on other releases of PyTorch, each in an environment of its own.

    python .make/torch_matrix.py 2.14.1 2.15.0

An environment has that PyTorch, and libraries that are built on it; it takes everything else from the one that this
script runs in. Most releases come as builds for CUDA of several gigabytes, so a release is skipped where the disk has
less than MIN_FREE_GIB left. With two releases, it also lets clients of three use one server at once.
What came out goes to benchmarks/torch-matrix.json, release by release; releases of earlier runs stay there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "torch-matrix.json"
#: What runs on each release: the device, the client's API, and the public example on a lease.
TESTS = ("tests/pytorch", "tests/test_lease.py", "tests/examples", "tests/releases/test_trainer.py")
#: What runs once there are two, with the interpreter that this script runs in.
TOGETHER = "tests/releases/test_three_clients.py"
#: What is installed beside each release: torchvision has operators of its own, transformers has the Trainer.
BESIDE = ("torchvision", "transformers", "accelerate")
#: An unpacked build for CUDA with what it depends on takes about 6 GiB, and as much again while it is installed.
MIN_FREE_GIB = 14
#: The longest run of a release's tests, in seconds.
MAX_RUN_S = 3600


def environment(release: str) -> Path:
    """Return the interpreter of the release's environment, made if it is missing. Raises CalledProcessError."""
    folder = ROOT / ".torch-matrix" / release
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--no-compile", "--quiet", f"torch=={release}", *BESIDE],
            check=True,
        )
        (site,) = folder.glob("lib/python*/site-packages")
        # Read after the environment's own packages, which therefore win.
        (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / ".ready").touch()
    return python


def run(python: Path, arguments: list[str]) -> dict[str, object]:
    """Run the tests with that interpreter; return how many passed, failed and were skipped, and which failed."""
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-rf",
        "-n",
        "2",
        "--dist",
        "loadfile",
        f"--junitxml={report}",
    ]
    try:
        subprocess.run(
            [*command, *TESTS, *arguments],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            timeout=MAX_RUN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {MAX_RUN_S} s"}
    outcomes: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcomes[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**outcomes, "failures": sorted(failed)}


def main(words: list[str]) -> int:
    releases = [word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)]
    arguments = [word for word in words if word not in releases]
    if not releases:
        print("Name the releases of PyTorch to try, such as: make torch-matrix TORCH='2.14.1 2.15.0'")
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wrong = False
    for release in releases:
        free_gib = shutil.disk_usage(ROOT).free >> 30
        print(f"PyTorch {release}", flush=True)
        if free_gib < MIN_FREE_GIB:
            print(f"  skipped: {free_gib} GiB are free on this disk, and it takes up to {MIN_FREE_GIB}")
            wrong = True
            continue
        try:
            results[release] = run(environment(release), arguments)
        except subprocess.CalledProcessError as e:
            print(f"  PyTorch {release} cannot be installed here: pip ended with {e.returncode}")
            wrong = True
            continue
        print(f"  {results[release]}", flush=True)
        wrong = wrong or bool(results[release].get("failures") or results[release].get("error"))
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    if sum((folder / ".ready").exists() for folder in (ROOT / ".torch-matrix").glob("*")) >= 2:
        print("Three clients of different releases at once", flush=True)
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", TOGETHER], cwd=ROOT, check=False)
        wrong = wrong or bool(done.returncode)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
