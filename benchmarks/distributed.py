"""A step of DistributedDataParallel on two slices of one lease, beside two processes of this machine with gloo.

The slices are on one server, or on two: then gradients go from worker to worker over TLS, or, where the workers are not
linked, through the clients.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import nn

from jupyter_gpupool.engines.local import worker_files
from jupyter_gpupool.transport import control
from jupyter_gpupool.transport.lifeline import Lifeline
from jupyter_gpupool.transport.specs import AttachSpec, DeviceSpec, WorkerSpec

from .far_worker import certificate, serve
from .networks import ResNet50

RANKS = 2
ROUNDS = 5
#: The network → the steps of a round. The second transformer is of the size that nanoGPT trains on Shakespeare's
#: letters; the first is so small that what each operator costs shows.
STEPS = {"resnet50": 1, "transformer": 5, "transformer_of_10_million": 1}
#: Of the transformers: width, heads, layers, and the batch's sequences and their length.
_TRANSFORMERS = {"transformer": (128, 4, 3, 16, 64), "transformer_of_10_million": (384, 6, 6, 4, 128)}
GOALS = {f"{name}_remote_to_local": ("<=", 1.1) for name in STEPS}
_SECRET = "of one benchmark"
_WORKER = "the worker"


def run() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, steps in STEPS.items():
        figures |= _on_two_servers(name, steps)
        with _ranks(None, name) as local, _ranks(_lease, name) as remote:
            ratios, times, cpu = [], [], []
            for _ in range(ROUNDS + 1):
                before = _workers_cpu_s()
                here, there = _round(local, steps), _round(remote, steps)
                worker_s = _workers_cpu_s() - before
                ratios.append(there.wall_s / here.wall_s)
                times.append(there.wall_s / steps)
                cpu.append([s / steps for s in (here.cpu_s, there.cpu_s, worker_s)])
                moved, gradients = there.moved / steps, there.gradients
            local_cpu_s, clients_cpu_s, worker_cpu_s = (statistics.median(s) for s in zip(*cpu[1:]))
        figures |= {
            f"{name}_remote_to_local": round(statistics.median(ratios[1:]), 3),
            f"{name}_step_ms": round(1e3 * statistics.median(times[1:]), 1),
            f"{name}_mib_through_a_client": round(moved / (1 << 20), 3),
            f"{name}_gradients_mib": round(gradients / (1 << 20), 1),
            # What a step takes of the processors, of all ranks: these bound the ratio where no core is idle.
            f"{name}_local_cpu_ms": round(1e3 * local_cpu_s, 1),
            f"{name}_clients_cpu_ms": round(1e3 * clients_cpu_s, 1),
            f"{name}_worker_cpu_ms": round(1e3 * worker_cpu_s, 1),
        }
    return figures


def _on_two_servers(name: str, steps: int) -> dict[str, Any]:
    figures = {}
    linked, unlinked = functools.partial(_spread_lease, True), functools.partial(_spread_lease, False)
    with _ranks(None, name) as local, _ranks(linked, name) as direct, _ranks(unlinked, name) as through:
        rounds = [[_round(ranks, steps) for ranks in (local, direct, through)] for _ in range(ROUNDS + 1)][1:]
    for way, number in (("linked", 1), ("through_clients", 2)):
        ratios = [found[number].wall_s / found[0].wall_s for found in rounds]
        times = [found[number].wall_s / steps for found in rounds]
        figures |= {
            f"{name}_two_servers_{way}_to_local": round(statistics.median(ratios), 3),
            f"{name}_two_servers_{way}_step_ms": round(1e3 * statistics.median(times), 1),
            f"{name}_two_servers_{way}_mib_through_a_client": round(
                rounds[-1][number].moved / steps / (1 << 20), 3
            ),
        }
    return figures


class _Round(NamedTuple):
    """Seconds until every rank is done and of the ranks' processors; the first rank's bytes, of its gradients too."""

    wall_s: float
    cpu_s: float
    moved: int
    gradients: int


def _round(ranks: list[Any], steps: int) -> _Round:
    began = time.perf_counter()
    for pipe in ranks:
        pipe.send(steps)
    said = [pipe.recv() for pipe in ranks]
    wall_s = time.perf_counter() - began
    return _Round(wall_s, sum(cpu_s for _, _, cpu_s in said), *said[0][:2])


def _workers_cpu_s() -> float:
    """Seconds of the processors that workers have taken so far."""
    workers = [p for p in multiprocessing.active_children() if p.name == _WORKER]
    return float(sum(sum(psutil.Process(p.pid).cpu_times()[:2]) for p in workers))


@contextmanager
def _lease() -> Iterator[AttachSpec]:
    """A worker with a slice for each rank."""
    devices = tuple(DeviceSpec(k, f"GPU-emulated-{k}", "emulated", 8192, 8192, True) for k in range(RANKS))
    spec = WorkerSpec(
        "benchmark", hashlib.sha256(_SECRET.encode()).hexdigest(), devices, attach_timeout_s=300.0
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        near = AttachSpec(spec.lease_id, "127.0.0.1", listener.getsockname()[1], _SECRET, devices, spec.ttl_s)
        worker = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, spec), name=_WORKER, daemon=True
        )
        worker.start()
    line = Lifeline(near, lambda reason: None)
    try:
        yield near
    finally:
        line.release()
        worker.kill()
        worker.join()


def _serve_linked(listener: socket.socket, spec: WorkerSpec, asked_at: socket.socket) -> None:
    from jupyter_gpupool.pytorch.worker import worker

    torch.set_num_threads(1)
    os._exit(worker.serve(spec, listener, lambda usage: None, asked_at=asked_at))


@contextmanager
def _spread_lease(is_linked: bool) -> Iterator[AttachSpec]:
    """A worker for each rank, as on servers of their own, which speak TLS."""
    from tests.support.linking_engines import LinkingEngines

    with ExitStack() as closing:
        own, engines = closing.enter_context(certificate()), closing.enter_context(LinkingEngines())
        parts, folders = [], []
        for rank in range(RANKS):
            device = DeviceSpec(rank, f"GPU-emulated-{rank}", "emulated", 8192, 8192, True)
            spec = WorkerSpec(
                "benchmark",
                hashlib.sha256(_SECRET.encode()).hexdigest(),
                (device,),
                attach_timeout_s=300.0,
                certfile=own.certfile,
                keyfile=own.keyfile,
            )
            folders.append(Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="gpupool-bench-"))))
            listener = closing.enter_context(socket.create_server(("127.0.0.1", 0), backlog=8))
            asked_at = closing.enter_context(
                control.listen(str(folders[-1]), spec.lease_id + worker_files.CONTROL)
            )
            worker = multiprocessing.get_context("spawn").Process(
                target=_serve_linked, args=(listener, spec, asked_at), name=_WORKER, daemon=True
            )
            worker.start()
            closing.callback(worker.join)
            closing.callback(worker.kill)
            address = listener.getsockname()
            parts.append(AttachSpec(spec.lease_id, *address, _SECRET, (device,), spec.ttl_s, secure=True))
        named = {part.devices[0].uuid: (part.host, part.port) for part in parts}
        for folder, part in zip(folders, parts):
            others = {name: to for name, to in named.items() if name != part.devices[0].uuid}
            engines.introduce(folder, part, others if is_linked else {})
        near = replace(
            parts[0],
            devices=tuple(part.devices[0] for part in parts),
            addresses=tuple((part.host, part.port) for part in parts),
        )
        lines = [Lifeline(part, lambda reason: None) for part in parts]
        yield near
        for line in lines:
            line.release()


@contextmanager
def _ranks(lease: Any, name: str) -> Iterator[list[Any]]:
    """Processes that train together, by the pipes that tell each to make steps."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as closing:
        spec = closing.enter_context(lease()) if lease is not None else None
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="gpupool-bench-"))
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            store = str(Path(folder, "store"))
            processes.append(
                context.Process(target=_train, args=(spec, store, rank, name, theirs), daemon=True)
            )
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()
        try:
            yield pipes
        finally:
            for pipe in pipes:
                pipe.send(0)
            for process in processes:
                process.join(30)
                process.kill()


def _network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "resnet50":
        return ResNet50(), torch.randn(4, 3, 96, 96)
    width, heads, layers, sequences, length = _TRANSFORMERS[name]
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return encoder, torch.randn(sequences, length, width)


def _train(spec: AttachSpec | None, store: str, rank: int, name: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    device = "cpu"
    stream: Any = None
    if spec is not None:
        from jupyter_gpupool.pytorch.client import session
        from jupyter_gpupool.pytorch.client.dispatch import attachment

        session.activate(spec)
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
        torch.cuda.synchronize()
        stream = attachment.stream(rank)
    backend = "gloo" if spec is None else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    network, batch = _network(name)
    model = nn.parallel.DistributedDataParallel(network.to(device))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = batch.to(device)
    pipe.send(None)
    while steps := pipe.recv():
        began_s = time.process_time()
        before = stream.bytes_up + stream.bytes_down if stream is not None else 0
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
        loss.item()
        after = stream.bytes_up + stream.bytes_down if stream is not None else 0
        pipe.send((after - before, gradients, time.process_time() - began_s))
