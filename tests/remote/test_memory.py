"""A slice has the memory that was granted: no more, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

MIB = 1 << 20


@pytest.fixture
def small(start_worker: Callable) -> Iterator[object]:
    from jupyter_gpupool.remote import session

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
    from jupyter_gpupool.remote import handshake
    from jupyter_gpupool.remote.stream import Stream

    facts = {"torch": torch.__version__, "threads": 1}
    sock, _ = handshake.connect(small.spec, "session", facts)  # type: ignore[attr-defined]
    other = Stream(sock, small.spec.devices)  # type: ignore[attr-defined]
    storage = other.allocate(50 * MIB, 0)
    other.wait()
    x = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match=r"14\.00 MiB is free"):
        x.sum().item()
    del storage, x
    other.wait()
    assert torch.ones(50 * MIB, dtype=torch.uint8, device="cuda")[0].item() == 1
    other.close()
