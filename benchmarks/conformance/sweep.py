"""Every sample of every entry; a table and JSON: ``python -m benchmarks.conformance.sweep [--output FILE]``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import jupyter_gpupool
from jupyter_gpupool.lease import current

from .cases import KINDS, Case, NotASample, cases, entries
from .refusals import REFUSALS

OUTPUT = Path(__file__).parent / "results.json"
DEVICE = "gpupool:0"
#: Seconds after which a sample counts as hung.
_HANGS_S = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ENTRY", help="a part of the entries' names")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all of them")
    parser.add_argument("--dtype", action="append", help="such as float32; default: all of them")
    parser.add_argument("--limit", type=int, help="the most samples of an entry, kind and dtype")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _hang)
    dtypes = {getattr(torch, name) for name in args.dtype} if args.dtype else None
    counts: Counter[tuple[str, str, str]] = Counter()
    failures: dict[str, list[str]] = {}
    began = time.monotonic()
    lease = jupyter_gpupool.attach()
    for entry in entries():
        name = entry.formatted_name
        if args.names and not any(part in name for part in args.names):
            continue
        for case in cases(entry, tuple(args.kind or KINDS), dtypes, args.limit):
            verdict, why = judge(case)
            counts[case.kind, "float32" if case.dtype == "float32" else "other", verdict] += 1
            if verdict == "failed":
                failures.setdefault(name, []).append(f"{case.kind} {case.dtype} {case.index}: {why}")
            if current() is None or "is gone" in why:
                lease.release()
                lease = jupyter_gpupool.attach()
    lease.release()
    table = _table(counts)
    _print(table, failures, time.monotonic() - began)
    if not args.names:
        found = {
            "torch": torch.__version__,
            "entries": len(entries()),
            "most_samples_of_a_kind_and_dtype": args.limit,
            "table": table,
            "failures": failures,
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {args.output}")
    return 1 if failures else 0


def judge(case: Case) -> tuple[str, str]:
    """Return ("passed" | "failed" | "refused" | "no sample" | "no longer refused", reason)."""
    refusal = REFUSALS.get(case.entry)
    expected = refusal is not None and refusal.covers(case.kind, case.dtype)
    try:
        signal.alarm(_HANGS_S)
        case.check(DEVICE)
    except NotASample as e:
        return "no sample", str(e)
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        return "refused" if expected else "failed", why
    finally:
        signal.alarm(0)
    return "passed", ""


def _hang(*_: Any) -> None:
    raise TimeoutError("it hangs; the worker is gone for this suite")


def _table(counts: Counter[tuple[str, str, str]]) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for dtypes in ("float32", "other"):
            row = {v: counts[kind, dtypes, v] for v in ("passed", "refused", "failed")}
            samples = sum(row.values())
            if samples:
                share = round(100 * row["passed"] / samples, 2)
                rows.append(
                    {"kind": kind, "dtypes": dtypes, "samples": samples, **row, "passed_percent": share}
                )
    return rows


def _print(table: list[dict[str, Any]], failures: dict[str, list[str]], seconds: float) -> None:
    for name, lines in failures.items():
        print(f"{name}: {len(lines)} failed, such as {lines[0]}")
    print("\n| samples | dtypes | number | passed | refused, with a reason | failed |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in table:
        passed = f"{row['passed']} ({row['passed_percent']} %)"
        print(
            f"| {row['kind']} | {row['dtypes']} | {row['samples']} | {passed} | {row['refused']} | {row['failed']} |"
        )
    print(f"\n{seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
