"""A slice has exactly the memory that was granted."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

MIB = 1 << 20


@pytest.fixture
def small(start_worker: Callable) -> Iterator[object]:
    from jupyter_gpupool.pytorch.client import session

    running = start_worker(num_gpus=1, memory_mib=64)
    session.activate(running.spec)
    yield running
    session.deactivate()


def test_beyond_the_slice_is_out_of_memory_and_the_lease_goes_on(small: object) -> None:
    kept = torch.ones(40 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Tried to allocate 30\.00 MiB.*64\.00 MiB of which 24\.00 MiB is free"
    ):
        torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        kept.float()
    assert kept[-1].item() == 1
    del kept
    assert torch.ones(60 * MIB, dtype=torch.uint8, device="cuda").sum().item() == 60 * MIB


def test_the_accounts_are_right(small: object) -> None:
    assert torch.cuda.memory_allocated() == 0
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() == 4096
    view = x[10:20]
    y = x + 1
    assert torch.cuda.memory_allocated() == 8192
    del x, y
    assert torch.cuda.memory_allocated() == 4096, "a view keeps its storage"
    del view
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == 8192
    assert torch.cuda.mem_get_info() == (64 * MIB, 64 * MIB)


def test_the_statistics_are_those_of_the_allocator(small: object) -> None:
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    x = torch.zeros(1000, device="cuda")
    y = torch.zeros(200, device="cuda")
    del x
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == 1024 == torch.cuda.memory_reserved()
    assert stats["allocated_bytes.all.peak"] == 5120 == torch.cuda.max_memory_allocated()
    assert stats["allocated_bytes.all.allocated"] == 5120
    assert stats["allocated_bytes.all.freed"] == 4096
    assert stats["allocation.all.current"] == 1
    assert stats["allocation.all.peak"] == 2
    assert (stats["num_ooms"], stats["allocation.all.freed"]) == (0, 1)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(100 * MIB, device="cuda")
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 1024
    summary = torch.cuda.memory_summary()
    assert "CUDA OOMs: 1" in summary
    assert "Allocated memory" in summary
    assert torch.accelerator.memory_stats()["allocated_bytes.all.current"] == 1024
    assert torch.accelerator.get_memory_info() == torch.cuda.mem_get_info() == (64 * MIB - 1024, 64 * MIB)
    del y
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == 0


def test_a_program_may_content_itself_with_less(small: object) -> None:
    torch.cuda.set_per_process_memory_fraction(0.25)
    assert torch.cuda.get_per_process_memory_fraction() == 0.25
    own = r"capacity of 64\.00 MiB of which 64\.00 MiB is free\. 16\.00 MiB allowed by set_per_process_memory_fraction;"
    with pytest.raises(torch.OutOfMemoryError, match=own):
        torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="Invalid fraction value: 2"):
        torch.cuda.set_per_process_memory_fraction(2)


def test_a_program_that_halves_its_batch_until_it_fits(small: object) -> None:
    # Without the collector: what a failed step held is free at once, not when cycles are collected next.
    gc.disable()
    try:
        batch = halved_until_it_fits()
    finally:
        gc.enable()
    assert batch == 8 * 1024


def halved_until_it_fits() -> int:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = 64 * 1024
    while True:
        try:
            optimizer.zero_grad()
            model(torch.ones(batch, 256, device="cuda")).mean().backward()
            optimizer.step()
            torch.cuda.synchronize()
            break
        except torch.cuda.OutOfMemoryError as e:
            assert "CUDA out of memory. Tried to allocate" in str(e)
        batch //= 2
        torch.cuda.empty_cache()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return batch


def test_training_for_long_leaks_nothing(small: object) -> None:
    model = torch.nn.Linear(100, 100).cuda()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> int:
        optimizer.zero_grad()
        model(torch.ones(8, 100, device="cuda")).sum().backward()
        optimizer.step()
        return torch.cuda.memory_allocated()

    step()
    settled = step()
    assert {step() for _ in range(300)} == {settled}


def test_the_worker_enforces_it_for_all_processes_of_a_lease(small: object) -> None:
    """Another process's tensors count: this one's own account alone would not notice."""
    from jupyter_gpupool.pytorch.client.dispatch.attachment import ClientSession
    from jupyter_gpupool.pytorch.client.tensor.command_stream import CommandStream

    connection = ClientSession(small.spec).open(small.spec, {"torch": torch.__version__, "threads": 1})  # type: ignore[attr-defined]
    other = CommandStream(connection, small.spec.devices)  # type: ignore[attr-defined]
    storage = other.allocate(50 * MIB, 0)
    other.wait()
    x = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match=r"14\.00 MiB is free"):
        x.sum().item()
    del storage, x
    other.wait()
    assert torch.ones(50 * MIB, dtype=torch.uint8, device="cuda")[0].item() == 1
    other.close()


def serve_with_a_context(listener: socket.socket, spec: Any) -> None:
    """A worker that needs 20 MiB of each slice for itself, as a CUDA context does."""
    from jupyter_gpupool.pytorch.worker import worker
    from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice

    whole = EmulatedDevice.__init__

    def begin(self: Any, *args: Any) -> None:
        whole(self, *args)
        self.overhead = 20 * MIB
        self.resize(self.spec)

    EmulatedDevice.__init__ = begin  # type: ignore[method-assign]
    os._exit(worker.serve(spec, listener, lambda usage: None))


def test_what_a_context_takes_is_not_for_tensors(start_worker: Callable) -> None:
    from jupyter_gpupool.pytorch.client import session

    running = start_worker(num_gpus=1, memory_mib=64, serve=serve_with_a_context)
    session.activate(running.spec)
    try:
        assert torch.cuda.mem_get_info() == (44 * MIB, 64 * MIB)
        kept = torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.mem_get_info() == (4 * MIB, 64 * MIB)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"64\.00 MiB of which 4\.00 MiB is free\. CUDA itself takes 20\.00 MiB",
        ):
            torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")  # at once, not when the worker refuses it
        del kept
        torch.cuda.set_per_process_memory_fraction(0.9)
        torch.empty(44 * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda.set_per_process_memory_fraction(0.5)
        with pytest.raises(torch.OutOfMemoryError, match=r"32\.00 MiB allowed by set_per_process"):
            torch.empty(33 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.get_per_process_memory_fraction() == 0.5
        torch.cuda.set_per_process_memory_fraction(1.0)
        session.resize(replace(running.spec, devices=(replace(running.spec.devices[0], limit_mib=84),)))
        with pytest.raises(torch.OutOfMemoryError, match=r"84\.00 MiB of which 64\.00 MiB is free"):
            torch.empty(65 * MIB, dtype=torch.uint8, device="cuda")
    finally:
        session.deactivate()


def serve_slowly(listener: socket.socket, spec: Any) -> None:
    """A worker that takes longer to set up its slices than a client waits for silence."""
    import threading

    from jupyter_gpupool.pytorch.worker import worker
    from jupyter_gpupool.pytorch.worker.emulated_device import EmulatedDevice

    whole, signs = EmulatedDevice.__init__, threading.Semaphore(0)
    send = worker.frames.send

    def noted(conn: Any, kind: Any, *args: Any) -> None:
        send(conn, kind, *args)
        signs.release()

    def begin(self: Any, *args: Any) -> None:
        for _ in range(3):
            signs.acquire()  # until its client has heard of it so often
        whole(self, *args)

    worker.frames.send = noted  # type: ignore[assignment]
    worker._SIGN_INTERVAL_S = 0.01
    EmulatedDevice.__init__ = begin  # type: ignore[method-assign]
    os._exit(worker.serve(spec, listener, lambda usage: None))


def test_a_client_waits_while_the_worker_sets_up_its_gpus(start_worker: Callable) -> None:
    from jupyter_gpupool.pytorch.client import session

    running = start_worker(num_gpus=1, memory_mib=64, serve=serve_slowly)
    session.activate(running.spec)
    try:
        assert torch.ones(3, device="cuda").sum().item() == 3
    finally:
        session.deactivate()
