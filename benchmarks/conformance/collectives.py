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
#: Tests with some 200 TFLOP of convolutions, which on emulated GPUs is an hour of the CPU.
_COMPUTES_LONG = frozenset({"test_ddp_uneven_inputs"})
PARTS = ("suite", "exchanges")
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
        began = time.monotonic()
        result = unittest.TestResult()
        smaller = fewer_elements() if name in _COMPUTES_LONG else contextlib.nullcontext()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), smaller:
            Ranks(name).run(result)
        if os.environ.get("GPUPOOL_TRACES"):
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
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


@contextlib.contextmanager
def fewer_elements() -> Iterator[None]:
    """Convolutions are taken at every eighth place alone: what ranks exchange stays as it is."""
    import torch

    class Sparse(torch.nn.Conv2d):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"stride": 8, **kwargs})

    with unittest.mock.patch.object(torch.nn, "Conv2d", Sparse):
        yield


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


def summary(part: str, ranks: int, rows: list[dict[str, str]]) -> dict[str, Any]:
    """A row of the table, with the tests behind its figures."""
    tests: dict[str, dict[str, list[str]]] = {v: {} for v in VERDICTS if v != "passed"}
    for row in rows:
        if row["verdict"] != "passed":
            tests[row["verdict"]].setdefault(row["why"], []).append(row["test"])
    if part == "exchanges":  # cases are many, and alike
        tests["refused"] = {why: [f"{len(some)} cases"] for why, some in tests["refused"].items()}
    return {
        "part": part,
        "ranks": ranks,
        **{v: sum(row["verdict"] == v for row in rows) for v in VERDICTS},
        "tests": {v: dict(sorted(by.items())) for v, by in tests.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance.collectives", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="TEST", help="a part of the tests' names; default: all of them"
    )
    parser.add_argument("--ranks", type=int, action="append", help=f"default: each of {RANKS}")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: both")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.within:
        Path(os.environ["GPUPOOL_FOUND"]).write_text(
            json.dumps(within(args.within, args.ranks[0], args.names))
        )
        return 0
    failed = False
    for part in args.part or PARTS:
        for ranks in args.ranks or RANKS:
            began = time.monotonic()
            row = summary(part, ranks, in_a_lease(ranks, part, args.names))
            figures = ", ".join(f"{row[v]} {v}" for v in VERDICTS)
            print(f"{part}, {ranks} ranks: {figures}; {time.monotonic() - began:.0f} s", flush=True)
            failed = failed or bool(row["failed"])
            if not args.names:
                enter(row, args.output)
    return 1 if failed else 0


def enter(row: dict[str, Any], file: Path) -> None:
    """Replace the row of that part and number of ranks; those that did not run stay."""
    import torch

    rows = json.loads(file.read_text())["table"] if file.exists() else []
    rows = [other for other in rows if (other["part"], other["ranks"]) != (row["part"], row["ranks"])]
    rows = sorted([*rows, row], key=lambda r: (PARTS.index(r["part"]), r["ranks"]))
    file.write_text(json.dumps({"torch": torch.__version__, "table": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
