"""The steps of `make gpu`, each in a process of its own: ``python -m benchmarks.gpu.steps STEP [--rehearse]``.

A step prints one line of JSON for each figure. The same process uses the GPU natively and, as ``gpupool:0``, through a
worker of its own; in a rehearsal the CPU stands for the native GPU, and the worker's is emulated.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jupyter_gpupool.transport.specs import AttachSpec

from .measuring import MIB, REMOTE, Setting, attached, figure, seconds, started
from .networks import compiled, gpt2, inference, mnist, training

ROOT = Path(__file__).parents[2]


def facts(setting: Setting) -> None:
    from jupyter_gpupool.gpus.mps import mps_runs

    figure("mps", mps_runs())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current",
             "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10,
        ).stdout.strip()  # fmt: skip
        figure("nvidia_smi", text)
    from jupyter_gpupool.pytorch.worker.devices import create_devices, prepare_process

    spec = setting.device(0.25)
    prepare_process([spec])
    began = time.perf_counter()
    device = create_devices([spec])[0]
    figure("create_device_s", time.perf_counter() - began)
    figure("context_mib", device.overhead / MIB)
    figure("usable_of_slice_mib", device.limit / MIB)
    counted = device.limit + device.overhead == spec.limit_mib * MIB and (
        device.overhead > 0 or spec.emulated
    )
    figure("context_counted", int(counted))
    if not setting.rehearse:
        figure("used_by_process_mib", (device._process.used_bytes() or 0) / MIB)  # type: ignore[attr-defined]
    blocks = []
    with torch.inference_mode():
        try:
            while True:
                device.take(64 * MIB)
                blocks.append(torch.empty(64 * MIB, dtype=torch.uint8, device=device.torch_device))
        except torch.OutOfMemoryError as e:
            figure("filled_mib", 64 * len(blocks))
            figure("refusal", str(e)[:120])


def tests(setting: Setting) -> None:
    environment = {**os.environ, **({"GPUPOOL_REHEARSE": "1"} if setting.rehearse else {})}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs"]
    running = subprocess.Popen(
        [*command, "tests/pytorch/client/test_real_gpu.py", "tests/gpus"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    names = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    assert running.stdout is not None
    for line in running.stdout:
        print(line, end="", flush=True)
        # As they end, so that a run that is cut off has counted them.
        found = re.match(r"\S+::\S.*? (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if found:
            counts[found[1]] += 1
            figure(names[found[1]], counts[found[1]])
    for word, count in counts.items():
        figure(names[word], count)
    if running.wait() not in (0, 1):
        raise SystemExit(f"pytest ended with exit code {running.returncode}")


def copies(setting: Setting) -> None:
    from benchmarks.echo import Echo
    from benchmarks.far_worker import certificate
    from jupyter_gpupool.pytorch.protocol.sizes import host_bytes

    nbytes = setting.size(256, 32) * MIB
    rounds = setting.size(7, 2)
    host = torch.zeros(nbytes, dtype=torch.uint8)
    here = torch.zeros(nbytes, dtype=torch.uint8, device=setting.native)
    pinned = host if setting.rehearse else host.pin_memory()

    def rate(function: Callable[[], Any], device: str) -> float:
        return nbytes / min(seconds(setting, device, function, 1) for _ in range(rounds + 1)) / 1e9

    pcie_up = rate(lambda: here.copy_(pinned, non_blocking=True), setting.native)
    pcie_down = rate(lambda: pinned.copy_(here, non_blocking=True), setting.native)
    figure("pcie_up_gb_per_s", pcie_up)
    figure("pcie_down_gb_per_s", pcie_down)
    figure("pageable_up_gb_per_s", rate(lambda: here.copy_(host), setting.native))

    def remote(prefix: str, echo: Any) -> None:
        there = torch.zeros(nbytes, dtype=torch.uint8, device=REMOTE)
        wire = (
            nbytes
            / min(seconds(setting, "cpu", lambda: echo.up(host_bytes(host)), 1) for _ in range(3))
            / 1e9
        )
        up = rate(lambda: there.copy_(host), REMOTE)
        down = rate(lambda: host.copy_(there), REMOTE)
        figure(f"{prefix}socket_gb_per_s", wire)
        figure(f"{prefix}to_slice_gb_per_s", up)
        figure(f"{prefix}from_slice_gb_per_s", down)
        figure(f"{prefix}to_slice_to_least", up / min(wire, pcie_up))
        figure(f"{prefix}from_slice_to_least", down / min(wire, pcie_down))

    import benchmarks.copies

    benchmarks.copies.SIZE = max(nbytes, benchmarks.copies.SIZE)
    with Echo() as echo, attached(setting):
        remote("", echo)
        _overlap(setting, host)
    with certificate() as secured, Echo(secured) as echo, attached(setting, certificate=secured):
        remote("tls_", echo)


def _overlap(setting: Setting, host: Any) -> None:
    """How much of an upload is hidden behind a computation that is as long."""
    n = setting.size(8192, 512)
    a = torch.randn(n, n, device=REMOTE)
    there = torch.zeros(len(host), dtype=torch.uint8, device=REMOTE)
    copy_s = min(seconds(setting, REMOTE, lambda: there.copy_(host), 1) for _ in range(3))
    one_s = min(seconds(setting, REMOTE, lambda: a @ a, 5) for _ in range(3))
    times = max(1, round(copy_s / one_s))

    def compute() -> None:
        for _ in range(times):
            a @ a

    def both() -> None:
        compute()
        there.copy_(host)

    compute_s = min(seconds(setting, REMOTE, compute, 1) for _ in range(3))
    both_s = min(seconds(setting, REMOTE, both, 1) for _ in range(3))
    figure("overlap_share", min(1.0, max(0.0, (compute_s + copy_s - both_s) / min(compute_s, copy_s))))


def operators(setting: Setting) -> None:
    count = setting.size(20_000, 2_000)

    def cost(device: str) -> tuple[float, float]:
        x = torch.ones(4, 4, device=device)
        x + x
        setting.wait(device)
        began = time.perf_counter()
        for _ in range(count):
            x + x
        issued = time.perf_counter() - began
        setting.wait(device)
        return 1e6 * issued / count, 1e6 * (time.perf_counter() - began) / count

    figure("native_us", min(cost(setting.native) for _ in range(3))[1])
    with attached(setting):
        runs = [cost(REMOTE) for _ in range(5)]
        figure("client_us", min(c for c, _ in runs))
        figure("remote_us", min(b for _, b in runs))
        x = torch.zeros((), device=REMOTE)
        figure(
            "one_value_us", 1e6 * statistics.median(seconds(setting, "cpu", x.item, 1) for _ in range(300))
        )
    _worker_cost(setting, count)


def _worker_cost(setting: Setting, count: int) -> None:
    """What the worker alone takes for a command, without a network: the loop over decoded records."""
    from jupyter_gpupool.pytorch.protocol import commands as codes
    from jupyter_gpupool.pytorch.worker.devices import create_devices
    from jupyter_gpupool.pytorch.worker.executor import WorkerSession

    device = create_devices([setting.device(0.25)])[0]
    session = WorkerSession([device], lambda header, copied: None, lambda report: print(report))
    layout = [[4, 4], [4, 1], 0, "float32", 0]
    definition = {
        "op": "aten::add.Tensor", "tensors": 2, "scalars": 0,
        "args": [["t", 0, layout], ["t", 1, layout]], "kwargs": {}, "results": layout,
    }  # fmt: skip
    with torch.inference_mode():
        session.run([codes.ALLOCATE, 1, 64, 0, codes.DEFINE, 0, definition])
        records: list[Any] = []
        for k in range(count):
            records += [0, 1, 1, 10 + k, codes.FREE, 10 + k]
        best = 1e9
        for _ in range(4):
            device.synchronize()
            began = time.perf_counter()
            session.run(records)
            device.synchronize()
            best = min(best, time.perf_counter() - began)
        a = torch.ones(4, 4, device=device.torch_device)
        native = seconds(setting, setting.native, lambda: a + a, count)
    figure("worker_us", 1e6 * (best / count - native))
    figure("worker_with_kernel_us", 1e6 * best / count)


def _share(setting: Setting, near: AttachSpec | None, gate: Any, results: Any, run_s: float) -> None:
    """One of several processes that compute at once; fills its slice first, where it has one."""
    device, held, foreign = setting.native, [], 0
    if near is not None:
        from jupyter_gpupool.pytorch.client import session

        session.activate(near)
        device = REMOTE
        block = setting.size(64, 16) * MIB
        try:
            while True:
                held.append(torch.zeros(block, dtype=torch.uint8, device=device))
                if len(held) % 8 == 0:
                    setting.wait(device)
        except torch.OutOfMemoryError:
            pass
        filled = len(held) * block / MIB
        del held[-max(1, len(held) // 2) :]
    else:
        filled = 0.0
    n = setting.size(2048, 128)
    a = torch.randn(n, n, device=device)
    a @ a
    setting.wait(device)
    gate.wait()
    ended, done = time.perf_counter() + run_s, 0
    while time.perf_counter() < ended:
        try:
            for _ in range(10):
                a @ a
            setting.wait(device)
            done += 10
        except torch.OutOfMemoryError:
            foreign += 1
            break
    results.put((done / run_s, filled, foreign))


def sharing(setting: Setting) -> None:
    count = setting.size(8, 2)
    context = multiprocessing.get_context("spawn")
    run_s = float(setting.size(5, 1))

    def together(nears: list[AttachSpec | None]) -> list[tuple[float, float, int]]:
        gate, results = context.Barrier(len(nears)), context.Queue()
        processes = [
            context.Process(target=_share, args=(setting, near, gate, results, run_s)) for near in nears
        ]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
        return found

    with contextlib.ExitStack() as stack:
        slices = [stack.enter_context(started(setting.device(1 / count))) for _ in range(count)]
        found = together([near for near, _ in slices])
        used = _used_mib([pid for _, pid in slices])
    remote = sum(rate for rate, _, _ in found)
    figure("slices", count)
    figure("filled_mib", [round(filled) for _, filled, _ in found])
    figure("refused_of_others", sum(foreign for _, _, foreign in found))
    limit = setting.device(1 / count).limit_mib
    figure("memory_over_limit_mib", max([0, *(mib - limit for mib in used)]))
    figure("remote_per_s", remote)
    native = sum(rate for rate, _, _ in together([None] * count))
    figure("native_per_s", native)
    figure("remote_to_native", remote / native)


def _used_mib(pids: list[int]) -> list[float]:
    """What the driver counts of these processes; nothing where it does not know them."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return []
    return [p.usedGpuMemory / MIB for p in found if p.pid in pids and p.usedGpuMemory]


def first_result(setting: Setting) -> None:
    times = []
    for _ in range(2):
        began = time.perf_counter()
        with attached(setting):
            torch.ones(2, device=REMOTE).sum().item()
            times.append(time.perf_counter() - began)
    figure("cold_worker_s", times[0])
    figure("second_worker_s", times[1])


def life(setting: Setting) -> None:
    from . import life as lease_life

    lease_life.run(setting.device(0.25), figure)


def residue(setting: Setting) -> None:
    from . import residue as left

    left.run(setting, figure)


def helper(setting: Setting) -> None:
    from . import helper as of_helper

    of_helper.run(setting.device(0.25), setting.size(1 << 16, 1 << 10), setting.size(75, 300), figure)


def conformance(setting: Setting) -> None:
    from torch.utils._pytree import tree_map

    from benchmarks.conformance.cases import SEED, cases, entries
    from benchmarks.conformance.refusals import REFUSALS, UNINITIALISED

    budget_s = setting.size(75, 15)
    ended = time.monotonic() + budget_s
    order = entries()
    random.Random(5).shuffle(order)
    same = differ = refused = no_sample = seen = 0
    first: list[str] = []
    with attached(setting):
        for entry in order:
            if time.monotonic() > ended:
                break
            seen += 1
            for case in cases(entry, ("forward", "backward"), {torch.float32}, 2):
                if case.entry in REFUSALS or case.entry in UNINITIALISED:
                    refused += 1
                    continue
                try:
                    torch.manual_seed(SEED)
                    expected = case.run(setting.native)
                except Exception:
                    no_sample += 1
                    continue
                try:
                    torch.manual_seed(SEED)
                    actual = case.run(REMOTE)
                    expected, actual = (tree_map(_cpu, value) for value in (expected, actual))
                    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
                    same += 1
                except (AssertionError, Exception) as e:
                    differ += 1
                    first.append(f"{case.entry} {case.kind}: {str(e).splitlines()[0][:80]}")
    figure("entries", seen)
    figure("same", same)
    figure("differ", differ)
    figure("refused", refused)
    figure("no_sample", no_sample)
    figure("first_that_differ", first[:10])


def _cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


STEPS: dict[str, Callable[[Setting], None]] = {
    step.__name__: step
    for step in (
        *(facts, tests, copies, operators, mnist, training, inference, gpt2),
        *(sharing, first_result, life, residue, conformance, compiled, helper),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.steps", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    setting = Setting(args.rehearse)
    if setting.rehearse:
        torch.set_num_threads(1)
    STEPS[args.step](setting)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
