"""The steps of `make gpu`, each in a process of its own: ``python -m benchmarks.gpu.steps STEP [--rehearse]``.

A step prints one line of JSON for each figure. The same process uses the GPU natively and, as ``gpupool:0``, through a
worker of its own; in a rehearsal the CPU stands for the native GPU, and the worker's is emulated.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from jupyter_gpupool.gpus.nvml import nvml_gpus
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

MIB = 1 << 20
REMOTE = "gpupool:0"
_SECRET = "of one benchmark"
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how large: on a GPU, or in a rehearsal."""

    rehearse: bool

    @property
    def native(self) -> str:
        return "cpu" if self.rehearse else "cuda:0"

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.rehearse else real

    def wait(self, device: str) -> None:
        """Wait until everything on a device has run."""
        if device == REMOTE:
            torch.gpupool.synchronize()  # type: ignore[attr-defined]
        elif device != "cpu":
            torch.cuda.synchronize()

    def device(self, share: float = 1.0) -> DeviceSpec:
        """A slice with that share of the first GPU's memory."""
        if self.rehearse:
            return DeviceSpec(0, "GPU-emulated", "emulated", int(4096 * share), 4096, True)
        gpu = nvml_gpus("localhost")[0]
        return DeviceSpec(0, gpu.uuid, gpu.name, int(gpu.memory_mib * share), gpu.memory_mib, False)


def figure(name: str, value: Any) -> None:
    """Report one figure."""
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    print(json.dumps({"figure": name, "value": value}), flush=True)


def _serve(listener: socket.socket, spec: WorkerSpec, ready: Any) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    ready.set()
    os._exit(worker.serve(spec, listener, lambda usage: None))


@contextlib.contextmanager
def started(device: DeviceSpec, certificate: Any = None) -> Iterator[tuple[AttachSpec, int]]:
    """A worker with one slice: how to reach it, and its process id."""
    spec = WorkerSpec(
        "benchmark", hashlib.sha256(_SECRET.encode()).hexdigest(), (device,), attach_timeout_s=120.0
    )
    if certificate:
        spec = dataclasses.replace(spec, certfile=certificate.certfile, keyfile=certificate.keyfile)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        port = listener.getsockname()[1]
        ready = multiprocessing.get_context("spawn").Event()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(listener, spec, ready), daemon=True
        )
        process.start()
        while not ready.wait(1.0):  # it imports PyTorch first
            if not process.is_alive():
                raise SystemExit(f"the worker ended with exit code {process.exitcode} before it was ready")
    near = AttachSpec(spec.lease_id, "127.0.0.1", port, _SECRET, (device,), spec.ttl_s)
    if certificate:
        near = dataclasses.replace(near, secure=True, ca=certificate.ca)
    try:
        yield near, process.pid or 0
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def attached(setting: Setting, share: float = 0.5, certificate: Any = None) -> Iterator[AttachSpec]:
    """A worker with one slice, attached to this process as ``gpupool:0``."""
    from jupyter_gpupool.pytorch.client import session

    with started(setting.device(share), certificate) as (near, _):
        session.activate(near)
        try:
            yield near
        finally:
            session.deactivate()


def seconds(setting: Setting, device: str, function: Callable[[], Any], times: int) -> float:
    """Seconds of one call, in a row of ``times`` without a wait between them."""
    setting.wait(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    setting.wait(device)
    return (time.perf_counter() - began) / times


def beside(
    setting: Setting, native: Callable[[], Any], remote: Callable[[], Any], times: int, rounds: int
) -> tuple[float, float, float]:
    """(native s, remote s, native ÷ remote): medians of alternating rounds after one that warms up.

    A ratio of 1 is native speed; less is slower.
    """
    for _ in range(3):
        native(), remote()
    pairs = [
        (seconds(setting, setting.native, native, times), seconds(setting, REMOTE, remote, times))
        for _ in range(rounds + 1)
    ][1:]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def show(name: str, found: tuple[float, float, float]) -> None:
    """Report what :func:`beside` measured."""
    prefix = f"{name}_" if name else ""
    figure(f"{prefix}native_ms", 1e3 * found[0])
    figure(f"{prefix}remote_ms", 1e3 * found[1])
    figure(f"{prefix}remote_to_native", found[2])


# -- the steps


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
    from benchmarks.copies import _Echo
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
    with _Echo() as echo, attached(setting):
        remote("", echo)
        _overlap(setting, host)
    with certificate() as secured, _Echo(secured) as echo, attached(setting, certificate=secured):
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


def mnist(setting: Setting) -> None:
    from benchmarks.mnist_step import Trainer

    with attached(setting):
        native, remote = Trainer(setting.native), Trainer(REMOTE)
        native.run(), remote.run(), remote.run()
        pairs = [(native.run(), remote.run()) for _ in range(setting.size(9, 2))]
    figure("native_ms", 1e3 * statistics.median(a for a, _ in pairs))
    figure("remote_ms", 1e3 * statistics.median(b for _, b in pairs))
    figure("remote_to_native", statistics.median(a / b for a, b in pairs))


def _resnets(setting: Setting) -> tuple[Any, Any]:
    from benchmarks.networks import ResNet50

    torch.manual_seed(1)
    net = ResNet50()
    return copy.deepcopy(net).to(setting.native), net.to(REMOTE)


def training(setting: Setting) -> None:
    batch, side = setting.size(256, 2), setting.size(224, 64)
    with attached(setting):

        def trainer(net: Any, device: str) -> Callable[[], Any]:
            optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(batch, 3, side, side, generator=generator).to(device)
            y = torch.randint(0, 1000, (batch,), generator=generator).to(device)

            def step() -> Any:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                return loss

            return step

        native, remote = _resnets(setting)
        here, there = trainer(native, setting.native), trainer(remote, REMOTE)
        first = here().item(), there().item()
        figure("first_losses", [round(loss, 5) for loss in first])
        show("", beside(setting, here, there, setting.size(5, 1), setting.size(4, 1)))


def inference(setting: Setting) -> None:
    side = setting.size(224, 64)
    with attached(setting), torch.no_grad():
        native, remote = (net.eval() for net in _resnets(setting))
        for name, batch, times in (("batch", setting.size(256, 4), 8), ("one", 1, 50)):
            x = torch.randn(batch, 3, side, side)
            here = functools.partial(native, x.to(setting.native))
            there = functools.partial(remote, x.to(REMOTE))
            figure(f"{name}_largest_difference", (here().cpu() - there().cpu()).abs().max().item())
            show(name, beside(setting, here, there, setting.size(times, 1), setting.size(5, 1)))


def compiled(setting: Setting) -> None:
    side = setting.size(224, 16)
    with attached(setting), torch.no_grad():
        # On two slow cores, ResNet-50 compiles for minutes.
        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        nets = (small, copy.deepcopy(small).to(REMOTE)) if setting.rehearse else _resnets(setting)
        native, remote = (net.eval() for net in nets)
        image = torch.randn(1, 3, side, side)
        here, there = image.to(setting.native), image.to(REMOTE)
        fast = torch.compile(remote, backend="gpupool", options={"inductor": True})
        began = time.perf_counter()
        fast(there).cpu()
        figure("remote_first_s", time.perf_counter() - began)
        _until_compiled(lambda: fast(there).cpu())
        figure("remote_compile_s", time.perf_counter() - began)
        began = time.perf_counter()
        quick = torch.compile(native)
        quick(here).cpu()
        figure("native_compile_s", time.perf_counter() - began)
        torch.testing.assert_close(fast(there).cpu(), quick(here).cpu(), rtol=1e-2, atol=1e-2)
        show("one", beside(setting, lambda: quick(here), lambda: fast(there), 50, 5))


def _until_compiled(call: Callable[[], Any]) -> None:
    """Call a graph until the worker has compiled it. Ends the step where it cannot: its eager speed is no figure."""
    from jupyter_gpupool.pytorch.client.compile.graphs import states

    while (state := states()) != ["compiled"]:
        if len(state) != 1 or state[0] not in ("", "compiling"):
            raise SystemExit(f"the worker did not compile the graph: {state}"[:500])
        call()


def gpt2(setting: Setting) -> None:
    from benchmarks.networks import Decoder

    torch.manual_seed(1)
    net = Decoder(**({"vocabulary": 500, "width": 64, "layers": 2, "heads": 4} if setting.rehearse else {}))
    words = 500 if setting.rehearse else 50257
    with attached(setting):
        native, remote = copy.deepcopy(net).to(setting.native), net.to(REMOTE)

        def trainer(model: Any, device: str) -> Callable[[], Any]:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
            shape = (setting.size(8, 2), setting.size(512, 16))
            tokens = torch.randint(0, words, shape, generator=torch.Generator().manual_seed(3)).to(device)

            def step() -> None:
                optimizer.zero_grad()
                F.cross_entropy(model(tokens, []), tokens[:, -1]).backward()
                optimizer.step()

            return step

        found = beside(
            setting,
            trainer(native, setting.native),
            trainer(remote, REMOTE),
            setting.size(5, 1),
            setting.size(4, 1),
        )
        show("step", found)
        count = setting.size(64, 4)
        prompt = torch.randint(0, words, (1, 16))
        here, there = prompt.to(setting.native), prompt.to(REMOTE)
        same = (native.decode(here, count).cpu() == remote.decode(there, count).cpu()).float().mean().item()
        figure("decoded_tokens_that_agree", same)
        show(
            "decode",
            beside(setting, lambda: native.decode(here, count), lambda: remote.decode(there, count), 1, 3),
        )


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
        *(sharing, first_result, life, conformance, compiled),
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
