"""Copies between two GPU servers of a lease whose workers are linked: the elements do not pass this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

from torch import nn  # noqa: E402

from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402

from ...support.cutting_proxy import CuttingProxy  # noqa: E402
from . import test_spread as spread_tests  # noqa: E402

EVERY = spread_tests.EVERY


@pytest.fixture
def servers(linked: Callable) -> Iterator[Any]:
    """A lease of three slices, attached to this process: ``cuda:0`` of one worker, the others of another."""
    lease = linked(1, 2)
    session.activate(lease.spec)
    yield lease
    session.deactivate()


def passed() -> int:
    """How many bytes of tensors this process has exchanged with the workers."""
    return sum(stream.bytes_up + stream.bytes_down for stream in attachment.streams())


def test_copies_have_every_type_layout_and_size(servers: Any) -> None:
    for here in EVERY:
        for there in EVERY:
            spread_tests.copies_are_right(here, there)
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.int64):
        local = torch.arange(12).view(3, 4).to(dtype)
        assert torch.equal(local.to("cuda:0").to("cuda:1").cpu(), local)
        assert torch.equal(
            torch.ones((), dtype=dtype, device="cuda:2").to("cuda:0").cpu(), torch.ones((), dtype=dtype)
        )


def test_no_element_passes_this_process(servers: Any) -> None:
    x = torch.rand(1000, 1000, device="cuda:0")
    y = torch.empty(1000, 1000, device="cuda:1", dtype=torch.float64)
    before = passed()
    for _ in range(3):
        z = x.to("cuda:2")
        y.copy_(x)
        x = (z + 1).to("cuda:0")
    assert passed() - before == 0
    assert torch.equal(y.to("cuda:0"), (x - 1).double())


def test_values_are_those_of_the_moment_of_the_copy(servers: Any) -> None:
    x = torch.zeros(100_000, device="cuda:0")
    copies = []
    for k in range(20):
        x.fill_(k)
        copies.append(x.to("cuda:1"))
    del x
    assert [c.unique().tolist() for c in copies] == [[k] for k in range(20)]


def test_a_network_with_its_halves_on_two_servers_trains_as_on_the_cpu(servers: Any) -> None:
    spread_tests.test_a_network_with_its_halves_on_two_servers_trains_as_on_the_cpu(servers)


def test_gradients_go_back_the_way_that_values_came(servers: Any) -> None:
    spread_tests.test_gradients_go_back_the_way_that_values_came(servers)


def test_threads_that_copy_both_ways_at_once_wait_for_nobody_for_ever(servers: Any) -> None:
    wrong: list[Any] = []

    def program(k: int) -> None:
        here, there = ("cuda:0", "cuda:1") if k % 2 else ("cuda:2", "cuda:0")
        x = torch.full((1000,), float(k), device=here)
        for _ in range(20):
            x = x.to(there).to(here)
        if x.sum().item() != 1000.0 * k:
            wrong.append(k)

    threads = [threading.Thread(target=program, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_in_data_parallel_over_both(servers: Any) -> None:
    torch.manual_seed(0)
    local = nn.Linear(6, 3)
    model = nn.DataParallel(nn.Linear(6, 3).to("cuda:0"), device_ids=[0, 1, 2])
    model.module.load_state_dict(local.state_dict())
    x = torch.rand(9, 6)
    model(x.to("cuda:0")).square().sum().backward()
    local(x).square().sum().backward()
    torch.testing.assert_close(model.module.weight.grad.cpu(), local.weight.grad)


def test_a_source_that_failed_is_named_where_the_copy_is_looked_at(servers: Any) -> None:
    square, other = torch.zeros(3, 3, device="cuda:0"), torch.ones(2, device="cuda:1")
    lost = torch.linalg.inv(square)
    with pytest.raises(RuntimeError, match="singular"):
        lost.to("cuda:1").cpu()
    for device in EVERY:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            continue
    assert other.to("cuda:0").tolist() == [1, 1]


def test_a_connection_that_is_lost_between_the_servers_is_made_again(linked: Callable) -> None:
    proxies: list[CuttingProxy] = []

    def way(port: int) -> int:
        proxies.append(CuttingProxy(("127.0.0.1", port)))
        return proxies[-1].port

    lease = linked(1, 1, ways={1: way})
    session.activate(lease.spec)
    try:
        x = torch.arange(3.0, device="cuda:0")
        assert x.to("cuda:1").tolist() == [0, 1, 2]
        proxies[0].cut_all()
        with pytest.raises(RuntimeError, match="the connection to the GPU server of rank . is lost"):
            while True:
                x.to("cuda:1").tolist()
        before = passed()
        y = torch.empty(3, device="cuda:1")
        for device in ("cuda:0", "cuda:1"):
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                continue
        y.copy_(x)
        assert passed() == before
        assert y.tolist() == [0, 1, 2]
    finally:
        session.deactivate()
        for proxy in proxies:
            proxy.cut_all()
