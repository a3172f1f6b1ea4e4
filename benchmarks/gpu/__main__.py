"""Run every check that needs a real GPU, one after the other, within ten minutes; `make gpu`.

``python -m benchmarks.gpu [STEP ...] [--rehearse] [--output FILE]``; without steps, all of them.

Each step is a process with a time limit. What it measures is shown and written as it comes, so that a step that is cut
off leaves what it has. Figures are compared with their goals and with those of the last run on the same kind of GPU.
Exits with 77 where there is no GPU, and with 1 where a step failed, a goal was missed or a figure became worse.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jupyter_gpupool.gpus.nvml import nvml_gpus

OUTPUT = Path(__file__).parents[1] / "gpu.json"
REHEARSAL = Path(__file__).parents[1] / "gpu-rehearsal.json"
NO_GPU = 77
#: All steps together, in seconds; what is left when it ends is left out.
TOTAL_S = 590.0
#: A figure that is worse than the last one by more than this share is a regression.
_TOLERANCE = 0.1


class Step(NamedTuple):
    """``limit_s``: seconds on one H200; a rehearsal on two slow cores may take longer."""

    name: str
    limit_s: float
    about: str


STEPS = (
    Step("facts", 40, "the card, the context's memory, what a slice of it can hold"),
    Step("tests", 150, "every test marked gpu"),
    Step("copies", 45, "copies both ways beside PCIe and a bare socket, plain and TLS"),
    Step("operators", 30, "µs an operator, of the client and of the worker"),
    Step("mnist", 40, "MNIST training beside native, plain and TLS"),
    Step("training", 70, "ResNet-50 training of a batch and of one image beside native, plain and TLS"),
    Step("inference", 60, "ResNet-50 inference of a batch and of one image, eager, plain and TLS"),
    Step("gpt2", 90, "a GPT-2 training step and decoding, plain and TLS, and a compiled step"),
    Step("sharing", 60, "slices that compute at once beside as many native processes"),
    Step("first_result", 30, "the first result of a fresh worker"),
    Step("life", 45, "a lease is resized and parked, and its worker crashes and is replaced"),
    Step("residue", 45, "whether a process finds what another one left on the card, also after kill -9"),
    Step("conformance", 90, "samples of PyTorch's operator suite, forward and backward, beside native"),
    Step("compiled", 110, "ResNet-50 for one image, compiled, with and without CUDA graphs, beside native"),
    Step("helper", 90, "a graph is compiled for a worker whose required sandbox lets it start no program"),
)

#: figure → (comparison, goal). A figure whose name ends so is compared with its last value too.
GOALS: dict[str, tuple[str, float]] = {
    "tests.failed": ("<=", 0),
    "tests.errors": ("<=", 0),
    "copies.to_slice_to_least": (">=", 0.9),
    "copies.from_slice_to_least": (">=", 0.9),
    "operators.worker_us": ("<=", 6.0),
    "mnist.remote_to_native": (">=", 0.95),
    "training.remote_to_native": (">=", 0.98),
    "inference.batch_remote_to_native": (">=", 0.98),
    "compiled.one_remote_to_native": (">=", 0.95),
    "facts.context_counted": (">=", 1),
    "sharing.refused_of_others": ("<=", 0),
    "sharing.memory_over_limit_mib": ("<=", 0),
    "life.crash_replaced_s": ("<=", 10.0),
    "residue.seen_within_a_process": (">=", 1),
    "residue.words_after_end": ("<=", 0),
    "residue.words_after_kill": ("<=", 0),
    "residue.words_after_workers_end": ("<=", 0),
    "residue.words_after_workers_kill": ("<=", 0),
    "helper.compiled": (">=", 1),
    "helper.same_digits": (">=", 1),
    "conformance.differ": ("<=", 0),
}
_HIGHER_IS_BETTER = ("_to_native", "_to_least", "_per_s")
_LOWER_IS_BETTER = ("_us", "_ms", "_s", "context_mib")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"any of: {', '.join(s.name for s in STEPS)}"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="small sizes, on an emulated GPU beside the CPU: shows that it runs",
    )
    parser.add_argument("--output", type=Path, help="where the figures go (default: benchmarks/gpu.json)")
    args = parser.parse_args()
    unknown = sorted(set(args.steps) - {s.name for s in STEPS})
    if unknown:
        parser.error(f"there is no step {unknown[0]!r}; there are {', '.join(s.name for s in STEPS)}")
    reason = "" if args.rehearse else why_not()
    if reason:
        print(f"make gpu: {reason}; nothing was measured (--rehearse runs the steps on an emulated GPU)")
        return NO_GPU
    output = args.output or (REHEARSAL if args.rehearse else OUTPUT)
    before = previous(output)
    began = time.monotonic()
    found: dict[str, Any] = {"machine": machine(args.rehearse), "steps": {}, "figures": {}}
    for step in STEPS:
        if args.steps and step.name not in args.steps:
            continue
        left = TOTAL_S - (time.monotonic() - began)
        limit_s = 600.0 if args.rehearse else min(step.limit_s, left)
        if limit_s < 5:
            found["steps"][step.name] = {"state": "left out: no time"}
            continue
        print(f"\n{step.name}: {step.about}", flush=True)
        found["steps"][step.name] = run_step(step.name, limit_s, args.rehearse, found["figures"])
        write(output, found)
    return judge(found, before, args.rehearse, output)


def why_not() -> str:
    """Why there is nothing to do here; empty if there is."""
    if not nvml_gpus("localhost"):
        return "NVML finds no GPU on this machine"
    import torch

    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} cannot use the GPU; install one built for CUDA"
    return ""


def command_of(name: str, rehearse: bool) -> list[str]:
    """The command of a step."""
    return [sys.executable, "-m", "benchmarks.gpu.steps", name, *(["--rehearse"] if rehearse else [])]


def run_step(
    name: str,
    limit_s: float,
    rehearse: bool,
    figures: dict[str, Any],
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run a step in a process group of its own; add its figures as they come, and return how it went."""
    began = now()
    process = subprocess.Popen(
        command_of(name, rehearse),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said: list[str] = []
    state = "done"
    while True:
        try:
            line = lines.get(timeout=max(0.1, limit_s - (now() - began)))
        except queue.Empty:
            state = f"cut off after {limit_s:.0f} s"
            break
        if line is None:
            break
        figure = figure_of(line)
        if figure is None:
            said.append(line.rstrip())
            continue
        key = f"{name}.{figure[0]}"
        if figures.get(key) != figure[1]:
            print(f"  {figure[0]:<40}{figure[1]!s:>14}{verdict(key, figure[1])}", flush=True)
        figures[key] = figure[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
    code = process.wait()
    if state == "done" and code:
        state = f"failed: {next((s for s in reversed(said) if s.strip()), f'exit code {code}')}"
    if state != "done":
        print("  " + "\n  ".join(said[-15:]))
        print(f"  {state}")
    return {"state": state, "seconds": round(now() - began, 1)}


def figure_of(line: str) -> tuple[str, Any] | None:
    """The figure on a line of a step's output, if there is one."""
    if not line.startswith('{"figure"'):
        return None
    try:
        data = json.loads(line)
        return data["figure"], data["value"]
    except (ValueError, KeyError):
        return None


def verdict(key: str, value: Any) -> str:
    """How a figure compares with its goal."""
    if key not in GOALS or not isinstance(value, (int, float)):
        return ""
    sign, goal = GOALS[key]
    return f"   goal {sign} {goal:g}: {'reached' if reached(key, value) else 'MISSED'}"


def reached(key: str, value: float) -> bool:
    """Whether a figure reaches its goal."""
    sign, goal = GOALS[key]
    return value <= goal if sign == "<=" else value >= goal


def worse(key: str, now: float, then: float) -> bool:
    """Whether a figure is worse than it was, by more than the runs differ."""
    if key.endswith(_HIGHER_IS_BETTER):
        return now < then * (1 - _TOLERANCE)
    return key.endswith(_LOWER_IS_BETTER) and now > then * (1 + _TOLERANCE)


def judge(found: dict[str, Any], before: dict[str, Any], rehearse: bool, output: Path) -> int:
    """Write and show what was missed, what became worse and what failed; return the exit code."""
    figures = found["figures"]
    numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    missed = [k for k, v in numbers.items() if k in GOALS and not reached(k, v)]
    same_card = before.get("machine", {}).get("gpu") == found["machine"]["gpu"]
    then = before.get("figures", {}) if same_card else {}
    fallen = [k for k, v in numbers.items() if isinstance(then.get(k), (int, float)) and worse(k, v, then[k])]
    failed = [f"{name} ({s['state']})" for name, s in found["steps"].items() if s["state"] != "done"]
    if rehearse:  # an emulated GPU has other figures; that everything runs is what counts
        missed, fallen = [k for k in missed if k.startswith(("tests.", "conformance."))], []
    found.update(missed=missed, worse=fallen)
    write(output, found)
    print()
    for title, names in (("steps that are not done", failed), ("goals missed", missed)):
        if names:
            print(f"{title}: {', '.join(names)}")
    if fallen:
        print("worse than last time: " + ", ".join(f"{k} {then[k]} → {numbers[k]}" for k in fallen))
    print(f"written to {output}")
    return 1 if failed or missed or fallen else 0


def previous(output: Path) -> dict[str, Any]:
    """What the last run has written."""
    try:
        data = json.loads(output.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write(output: Path, found: dict[str, Any]) -> None:
    """Write what there is, so that it is there whatever comes next."""
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(output)


def machine(rehearse: bool) -> dict[str, Any]:
    """The machine, for those who read the figures."""
    import torch

    gpus = () if rehearse else nvml_gpus("localhost")
    return {
        "gpu": gpus[0].name if gpus else "emulated on the CPU",
        "gpus": len(gpus),
        "memory_mib": gpus[0].memory_mib if gpus else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "rehearsal": rehearse,
    }


if __name__ == "__main__":
    sys.exit(main())
