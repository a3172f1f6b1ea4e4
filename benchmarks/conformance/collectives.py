"""PyTorch's own tests of collectives on one lease: ``python -m benchmarks.conformance.collectives``.

They are those of ``torch.testing._internal.distributed.distributed_test``, with the backend ``nccl``. Each rank is a
process of its own that is forked after the lease was attached. Beside them stand the cases of exchanges.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .collective_refusals import reason_of

OUTPUT = Path(__file__).parent / "collectives.json"
RANKS = (2, 3, 4)
#: Seconds after which a test counts as hung; one rank's imports of a busy machine are among them.
_HANGS_S = 120
VERDICTS = ("passed", "refused", "failed", "skipped")


def suite(ranks: int, names: list[str], log: Path) -> Iterator[tuple[str, str, str]]:
    """Run PyTorch's tests whose names contain one of ``names``; yield each one's (name, verdict, why).

    To be called once in a process: PyTorch's module reads the number of ranks and the backend when it is imported.
    """
    os.environ |= {
        "BACKEND": "nccl",
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(_HANGS_S),
    }
    import torch

    # An emulated GPU's server has no NCCL to ask for its version, which decides what PyTorch's module tries.
    with unittest.mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 27, 0)):
        from torch.testing._internal.distributed import distributed_test as public
    torch.set_num_threads(1)
    logging.disable(logging.INFO)

    class Ranks(public.TestDistBackend, public.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(multiprocessing.get_context("fork").Process)

        @classmethod
        def _run(cls, *args: Any, **kwargs: Any) -> None:
            with log.open("ab") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            super()._run(*args, **kwargs)

        def call_dist_op(self, *args: Any, **kwargs: Any) -> None:
            """Profiles have no events of NCCL's, so none are looked for; what the tests compute counts."""
            super().call_dist_op(*args, **{**kwargs, "expect_event": False})

    Ranks.setUpClass()
    for name in unittest.TestLoader().getTestCaseNames(Ranks):
        if names and not any(part in name for part in names):
            continue
        log.write_bytes(b"")
        result = unittest.TestResult()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            Ranks(name).run(result)
        if result.skipped:
            yield name, "skipped", result.skipped[0][1].partition("\n")[0]
        elif result.wasSuccessful():
            yield name, "passed", ""
        else:
            why = (result.errors + result.failures)[0][1]
            known = reason_of(name, why)
            if not known and os.environ.get("GPUPOOL_TRACES"):
                print(f"{name}\n{why}", file=sys.stderr)
            yield name, "refused" if known else "failed", known or last_lines(why)


def last_lines(trace: str) -> str:
    """The line with which a traceback of several ranks says what happened first."""
    lines = [line for line in trace.splitlines() if line and not line.startswith((" ", "Traceback"))]
    named = [
        line for line in lines if ": " in line and line.partition(":")[0].endswith(("Error", "Exception"))
    ]
    said = [
        line for line in named if "exited with error code" not in line and "Exception raised from" not in line
    ]
    return (said or named or lines or ["no reason"])[0][:300]


def in_a_lease(ranks: int, part: str, names: list[str]) -> list[dict[str, str]]:
    """Run a part (``suite`` or ``exchanges``) in a process that holds a lease of ``ranks`` emulated GPUs."""
    with tempfile.TemporaryDirectory(prefix="gpupool-conformance-", ignore_cleanup_errors=True) as home:
        for kind in ("data", "runtime", "config"):
            Path(home, kind).mkdir(mode=0o700)
        config = Path(home, "config", "jupyter_gpupool_config.py")
        config.write_text(f"c.LocalEngine.emulated_count = {ranks}\nc.LocalEngine.emulate = 'always'\n")
        command = [sys.executable, "-m", __spec__.name, f"--within={part}", f"--ranks={ranks}", *names]
        environment = {
            f"JUPYTER_{kind.upper()}_DIR": str(Path(home, kind)) for kind in ("data", "runtime", "config")
        }
        found = Path(home, "found.json")
        subprocess.run(command, env={**os.environ, **environment, "GPUPOOL_FOUND": str(found)}, check=True)
        return json.loads(found.read_text())


def within(part: str, ranks: int, names: list[str]) -> list[dict[str, str]]:
    """What :func:`in_a_lease` runs there."""
    import jupyter_gpupool

    from . import exchanges

    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="gpupool-conformance-") as folder,
        jupyter_gpupool.attach(num_gpus=ranks, memory_fraction=0.8),
    ):
        run = suite if part == "suite" else exchanges.suite
        for name, verdict, why in run(ranks, names, Path(folder, "log")):
            rows.append({"test": name, "verdict": verdict, "why": why})
            if verdict == "failed":
                print(f"{ranks} ranks, {name}: {why}", flush=True)
    return rows


def figures(rows: list[dict[str, str]]) -> dict[str, int]:
    return {v: sum(row["verdict"] == v for row in rows) for v in VERDICTS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance.collectives", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="TEST", help="a part of the tests' names; default: all of them"
    )
    parser.add_argument("--ranks", type=int, action="append", help=f"default: each of {RANKS}")
    parser.add_argument("--part", choices=("suite", "exchanges"), action="append", help="default: both")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.within:
        Path(os.environ["GPUPOOL_FOUND"]).write_text(
            json.dumps(within(args.within, args.ranks[0], args.names))
        )
        return 0
    began = time.monotonic()
    table, reasons, failures = [], {}, {}
    for part in args.part or ("suite", "exchanges"):
        for ranks in args.ranks or RANKS:
            rows = in_a_lease(ranks, part, args.names)
            table.append({"part": part, "ranks": ranks, **figures(rows)})
            print(table[-1], flush=True)
            for row in rows:
                if row["verdict"] == "refused":
                    reasons.setdefault(row["why"], set()).add(row["test"])
                if row["verdict"] == "failed":
                    failures.setdefault(f"{part}, {ranks} ranks: {row['test']}", row["why"])
    print(f"{time.monotonic() - began:.0f} s")
    if not (args.names or args.ranks or args.part):
        import torch

        found = {
            "torch": torch.__version__,
            "table": table,
            "refused": {why: sorted(tests) for why, tests in sorted(reasons.items())},
            "failures": failures,
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {args.output}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
