"""JAX's own tests on leased slices, against those that the CPU passes; a table and JSON.

``python -m benchmarks.conformance.jax_suite FOLDER``; FOLDER has the tests of the installed release of JAX, which are
not part of this package: ``tests/`` of its sources. They need absl-py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from .jax_recorder import RECORD, SHARE, SLICES, is_taken
from .jax_refusals import reason

OUTPUT = Path(__file__).parent / "jax.json"
FILES = (
    *("lax_test", "lax_numpy_test", "api_test", "random_test", "random_lax_test", "linalg_test"),
    *("pmap_test", "shard_map_test", "python_callback_test", "debugging_primitives_test"),
)
#: The files whose programs use several devices, and how many they get.
SEVERAL, NUM_SLICES = ("pmap_test", "shard_map_test"), 2
#: A process of tests that says nothing for so long is given up, in seconds.
_HANGS_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance.jax_suite", description=__doc__)
    parser.add_argument("tests", type=Path, metavar="FOLDER", help="the folder tests/ of JAX's sources")
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"default: {', '.join(FILES)}")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the tests of a file (default: %(default)s)"
    )
    parser.add_argument("--cases", type=int, default=10, help="most cases of a test (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="keep each test's outcome there, and run only the others"
    )
    args = parser.parse_args()
    import jax

    rows = []
    with tempfile.TemporaryDirectory(prefix="gpupool-jax-suite-") as home:
        for part in ("data", "runtime", "config"):
            os.environ[f"JUPYTER_{part.upper()}_DIR"] = str(Path(home, part))
            Path(home, part).mkdir(mode=0o700)
        records = args.records or Path(home)
        records.mkdir(exist_ok=True)
        for name in args.files or FILES:
            began = time.monotonic()
            file = args.tests / f"{name}.py"
            found = [
                run(file, records, slices, args.share, args.cases)
                for slices in (0, NUM_SLICES if name in SEVERAL else 1)
            ]
            slices = NUM_SLICES if name in SEVERAL else 1
            sample = {"slices": slices, "share": args.share, "most_cases_of_a_test": args.cases}
            rows.append({"file": name, **sample, **compare(*found)})
            write(args.output, rows, jax.__version__)
            print(_line(rows[-1]), f"{time.monotonic() - began:.0f} s", flush=True)
            for test, why in rows[-1]["failures"].items():
                print(f"  {test}: {why}", flush=True)
    print(f"written to {args.output}")
    return 1 if any(row["failures"] for row in rows) else 0


def write(output: Path, rows: list[dict[str, Any]], jax_version: str) -> None:
    """Write the figures of these files, and keep those of the others."""
    known = json.loads(output.read_text())["files"] if output.exists() else []
    by_name = {row["file"]: row for row in [*known, *rows]}
    figures = {"jax": jax_version, "files": [by_name[name] for name in FILES if name in by_name]}
    output.write_text(json.dumps(figures, indent=1) + "\n")


def run(file: Path, records: Path, slices: int, share: float, cases: int) -> dict[str, tuple[str, str]]:
    """Run a file's tests, and return the outcome of each by its name, with the reason."""
    record = records / f"{file.stem}-{metadata.version('jax')}-{cases}-{slices}.jsonl"
    record.write_text(known(record.read_text()) if record.exists() else "")
    environment = {
        **os.environ,
        **{RECORD: str(record), SHARE: str(share), SLICES: str(slices)},
        **{
            "JAX_NUM_GENERATED_CASES": str(cases),
            "XLA_FLAGS": "",
            "JAX_NUM_CPU_DEVICES": str(max(1, slices)),
        },
    }
    if not slices:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_NUM_CPU_DEVICES"] = str(NUM_SLICES if file.stem in SEVERAL else 1)
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:jaxtyping"]
    options += ["-p", "benchmarks.conformance.jax_recorder"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "--rootdir",
        str(file.parent),
        "-c",
        os.devnull,
        str(file),
    ]
    while True:
        before = record.stat().st_size
        said = record.with_suffix(".output")
        with said.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            ended = _watch(process, record)
        begun = [json.loads(line) for line in record.read_text().splitlines()]
        if begun and begun[-1][1] == "begun":
            _add(record, begun[-1][0], "died" if ended else "hung")
        elif process.returncode in (0, 1, 5):
            break
        elif record.stat().st_size == before:
            raise SystemExit(f"{file}: the tests do not run:\n{said.read_text()[-2000:]}")
    outcomes: dict[str, tuple[str, str]] = {}
    for name, outcome, why in map(json.loads, record.read_text().splitlines()):
        if is_taken(name, share):  # a record may be of more
            outcomes[name] = (outcome, why)
    return outcomes


def known(record: str) -> str:
    """Return what a record of an earlier run says of tests that need not run again: those that passed or were skipped.

    A test that was not finished has to run, and one that failed may pass now.
    """
    lines = [(line, json.loads(line)) for line in record.splitlines()]
    return "".join(f"{line}\n" for line, (_, outcome, _) in lines if outcome in ("passed", "skipped"))


def _watch(process: subprocess.Popen[bytes], record: Path) -> bool:
    """Wait until a process ends; False if it was ended, because it said nothing for too long."""
    size, heard = record.stat().st_size, time.monotonic()
    while True:
        try:
            process.wait(1.0)
            return True
        except subprocess.TimeoutExpired:
            now = record.stat().st_size
            if now != size:
                size, heard = now, time.monotonic()
            elif time.monotonic() - heard > _HANGS_S:
                process.kill()
                process.wait()
                return False


def _add(record: Path, name: str, outcome: str) -> None:
    with record.open("a") as file:
        file.write(json.dumps([name, outcome, f"the process {outcome}"]) + "\n")


def compare(cpu: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return how many tests that the CPU passes pass on slices, and what happened to the others."""
    wanted = [name for name, (outcome, _) in cpu.items() if outcome == "passed"]
    refused: Counter[str] = Counter()
    failures: dict[str, str] = {}
    passed = 0
    for name in wanted:
        outcome, why = ours.get(name, ("missing", "it did not run"))
        if outcome == "passed":
            passed += 1
        elif said := reason(why):
            refused[said] += 1
        else:
            failures[name] = f"{outcome}: {why}"
    return {
        **{"cpu_passes": len(wanted), "passed": passed, "refused": dict(refused), "failed": len(failures)},
        **{"passed_percent": round(100 * passed / len(wanted), 2) if wanted else 100.0, "failures": failures},
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['file']} | {row['cpu_passes']} | {row['passed']} ({row['passed_percent']} %) "
        f"| {sum(row['refused'].values())} | {row['failed']} |"
    )


if __name__ == "__main__":
    sys.exit(main())
