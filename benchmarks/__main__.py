"""Run the benchmarks one after the other, print a table, and write the figures as JSON.

``python -m benchmarks [NAME ...] [--output FILE] [--traces FOLDER]``; without names, all of them. Those that replay
public traces need the folder that has them, and one needs rgpu; without these, the others run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from jupyter_gpupool.pytorch.worker.heap import keep_freed_memory

from .missing import Missing
from .replay import TRACES

#: In this order; each module has ``run() -> dict`` and ``GOALS``: figure → (comparison, goal).
NAMES = (
    *(
        "mnist_step",
        "operator_cost",
        "worker_cost",
        "reconnect",
        "layers",
        "copies",
        "decoding",
        "compiled",
        "latency",
        "distributed",
        "jax_steps",
    ),
    *(
        "parking",
        "moving",
        "first_result",
        "sandbox",
        "kernel_start",
        "manager_grants",
        "api_grants",
        "farm_grants",
        "hub",
        "tenants",
    ),
    *("admissions", "panel"),
    *("queue_replay", "idle_replay", "dispatch_floor", "beside_rgpu"),
)
OUTPUT = Path(__file__).parent / "results.json"


def machine() -> dict[str, Any]:
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or "unknown",
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "emulated on the CPU",
        "date": datetime.date.today().isoformat(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)}")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="where the figures go (default: %(default)s)"
    )
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help=f"the folder of the traces (default: ${TRACES})"
    )
    args = parser.parse_args()
    if args.traces:
        os.environ[TRACES] = str(args.traces)
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")

    results: dict[str, Any] = {}
    if args.output.exists():
        results = json.loads(args.output.read_text()).get("benchmarks", {})
    about = machine()
    # Emulated GPUs keep freed memory. The local side must too, or page faults would distort the ratios.
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="gpupool-bench-") as home:
        # A separate Jupyter configuration, so that the user's pool and ledger stay untouched.
        for part in ("data", "runtime", "config"):
            os.environ[f"JUPYTER_{part.upper()}_DIR"] = str(Path(home, part))
            Path(home, part).mkdir(mode=0o700)
        for name in args.names or NAMES:
            module = importlib.import_module(f"benchmarks.{name}")
            print(f"\n{name}: {module.__doc__.splitlines()[0]}", flush=True)
            try:
                figures = module.run()
            except Missing as e:
                if name in args.names:
                    sys.exit(f"{name}: {e}")
                print(f"  left out: {e}")
                continue
            results[name] = figures
            _show(figures, getattr(module, "GOALS", {}))
    args.output.write_text(json.dumps({"machine": about, "benchmarks": results}, indent=2) + "\n")
    print(f"\nwritten to {args.output}")


def _show(figures: dict[str, Any], goals: dict[str, tuple[str, float]], indent: str = "  ") -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _show(value, goals, indent + "  ")
            continue
        goal = ""
        if key in goals and isinstance(value, (int, float)):
            sign, limit = goals[key]
            met = value <= limit if sign == "<=" else value >= limit
            goal = f"   goal {sign} {limit:g}: {'reached' if met else 'MISSED'}"
        aligned = f"{value:>12}" if isinstance(value, (int, float)) else value
        print(f"{indent}{key:<34}{aligned}{goal}")


if __name__ == "__main__":
    sys.exit(main())
