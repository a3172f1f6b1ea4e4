"""What a matrix of releases is: tests with the interpreter of each release, and what came out, release by release."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import venv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
#: The longest run of a release's tests, in seconds.
MAX_RUN_S = 3600


def environment(folder: Path, packages: list[str]) -> Path:
    """Return the interpreter of an environment with these packages, made if it is missing.

    It takes everything else from the one that this runs in. Raises CalledProcessError.
    """
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--no-compile", "--quiet", *packages], check=True
        )
        (site,) = folder.glob("lib/python*/site-packages")
        # Read after the environment's own packages, which therefore win.
        (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / ".ready").touch()
    return python


def run(python: Path, arguments: list[str]) -> dict[str, object]:
    """Run pytest with that interpreter; return how many passed, failed and were skipped, and which failed."""
    report = python.parent.parent / "report.xml"
    report.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-rf", f"--junitxml={report}", *arguments],
            cwd=ROOT,
            env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            timeout=MAX_RUN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {MAX_RUN_S} s"}
    if done.returncode not in (0, 1) or not report.exists():
        return {"error": f"pytest ended with {done.returncode}"}
    outcomes: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcomes[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**outcomes, "failures": sorted(failed)}


def run_all(
    words: list[str],
    framework: str,
    example: str,
    tests: list[str],
    packages: Callable[[str], list[str]],
    objection: Callable[[], str] = lambda: "",
) -> int:
    """Run the tests on each release that is named among the words, and write what came out. Return an exit code.

    The other words are pytest's. ``example``: a call that names releases; ``packages``: what a release's environment
    has; ``objection``: why no environment is made now.
    """
    releases = [word for word in words if re.fullmatch(r"\d+(\.\d+)+", word)]
    arguments = [word for word in words if word not in releases]
    if not releases:
        print(f"Name the releases of {framework} to try, such as: {example}")
        return 2
    name = example.split()[1]
    results_file = ROOT / "benchmarks" / f"{name}.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    wrong = False
    for release in releases:
        print(f"{framework} {release}", flush=True)
        if reason := objection():
            print(f"  skipped: {reason}")
            wrong = True
            continue
        try:
            python = environment(ROOT / f".{name}" / release, packages(release))
        except subprocess.CalledProcessError as e:
            print(f"  {framework} {release} cannot be installed here: pip ended with {e.returncode}")
            wrong = True
            continue
        results[release] = run(python, [*tests, *arguments])
        print(f"  {results[release]}", flush=True)
        wrong = wrong or bool(results[release].get("failures") or results[release].get("error"))
        results_file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    return int(wrong)
