"""A lease with slices on several servers: three devices, the first on another worker than the others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import comm

from jupyter_gpupool.pytorch.client import evacuate, session
from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.pytorch.client.tensor.command_stream import WorkerGone
from jupyter_gpupool.transport.lifeline import Lifeline

EVERY = ("cuda:0", "cuda:1", "cuda:2")


def test_each_device_computes_at_its_own_worker(spread: Any) -> None:
    assert len(attachment.attached().connect() and attachment.streams()) == 2
    for device in EVERY:
        x = torch.arange(6.0, device=device)
        assert str((x * 2).device) == device
        assert (x * 2).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        assert torch.cuda.memory_allocated(device) > 0
        assert torch.nonzero(x > 3).flatten().tolist() == [4, 5], "where the worker says what comes of it"
        assert torch.cuda.mem_get_info(device)[0] < torch.cuda.mem_get_info(device)[1]
    torch.cuda.synchronize()
    for device in EVERY:
        torch.cuda.synchronize(device)


def test_copies_between_devices(spread: Any) -> None:
    for here in EVERY:
        for there in EVERY:
            copies_are_right(here, there)


def copies_are_right(here: str, there: str) -> None:
    local = torch.randn(4, 5)
    x = local.to(here)
    assert torch.equal(x.to(there).cpu(), local)
    assert torch.equal(x.t().to(there).cpu(), local.t())
    assert x.t().to(there).stride() == (1, 5)
    assert torch.equal(x.to(there, torch.float64).cpu(), local.double())
    assert torch.equal(x.to(there, torch.float16).cpu(), local.half())
    y = torch.zeros(3, 4, 5, device=there)
    y.copy_(x)
    assert torch.equal(y.cpu(), local.expand(3, 4, 5))
    y[1, :, ::2] = x[:, ::2] * 2
    expected = local.expand(3, 4, 5).clone()
    expected[1, :, ::2] = local[:, ::2] * 2
    assert torch.equal(y.cpu(), expected)
    whole = torch.zeros(4, 5, dtype=torch.int64, device=there)
    assert torch.equal(whole.copy_(x).cpu(), local.long())
    assert torch.equal(torch.empty(0, device=here).to(there).cpu(), torch.empty(0))
    like = torch.full_like(x.t(), 7.0, device=there)
    assert str(like.device) == there
    assert like.stride() == (1, 5)
    assert like.cpu().eq(7).all()
    assert str(x.new_zeros(2, device=there).device) == there == str(torch.empty_like(x, device=there).device)


def test_gradients_go_back_the_way_that_values_came(spread: Any) -> None:
    local = torch.randn(3, 4, requires_grad=True)
    x = local.detach().to("cuda:0").requires_grad_()
    for program in (x, local):
        a = program.to("cuda:1") if program is x else program
        b = (a.sin() * 3).to("cuda:2") if program is x else a.sin() * 3
        c = b.exp().to("cuda:0") if program is x else b.exp()
        (c * program).sum().backward()
    assert x.grad is not None
    assert local.grad is not None
    assert str(x.grad.device) == "cuda:0"
    torch.testing.assert_close(x.grad.cpu(), local.grad)


def test_tensors_of_two_servers_in_one_call_are_refused_as_with_cuda(spread: Any) -> None:
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:2")
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cuda:2!"):
        a + b
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.cat([a, b])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="same device"):
        torch.matmul(a, b)
    assert (a + b.to(a.device)).tolist() == [2.0, 2.0, 2.0]


class Net(nn.Module):
    """Its halves on two servers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.to(self.first.weight.device)).relu()
        return self.last(x.to(self.last.weight.device))


def test_a_network_with_its_halves_on_two_servers_trains_as_on_the_cpu(spread: Any) -> None:
    torch.manual_seed(0)
    local = Net()
    net = copy.deepcopy(local)
    net.first.to("cuda:0")
    net.last.to("cuda:2")
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    for program, target in ((net, y.to("cuda:2")), (local, y)):
        optimizer = torch.optim.Adam(program.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(program(x), target).backward()
            nn.utils.clip_grad_norm_(program.parameters(), 0.5)
            optimizer.step()
    for a, b in zip(net.parameters(), local.parameters()):
        torch.testing.assert_close(a.cpu(), b)


def test_data_parallel_over_servers(spread: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    local = copy.deepcopy(net)
    x = torch.randn(12, 6)
    parallel = nn.DataParallel(net.cuda())
    out, expected = parallel(x.cuda()), local(x)
    torch.testing.assert_close(out.cpu(), expected)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(net.parameters(), local.parameters()):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.cpu(), b.grad)
    parts = comm.scatter(x.cuda(), [0, 1, 2])
    assert [str(part.device) for part in parts] == list(EVERY)
    assert torch.equal(comm.gather(parts, 0, destination=2).cpu(), x)
    assert comm.reduce_add([part.sum() for part in parts], destination=1).item() == pytest.approx(
        x.sum().item()
    )


def test_random_numbers(spread: Any) -> None:
    torch.manual_seed(5)
    first = [torch.randn(3, device=device).tolist() for device in EVERY]
    assert first[0] == first[1] == first[2], "a seed gives the same numbers on any of them"
    states = torch.cuda.get_rng_state_all()
    again = [torch.rand(2, device=device).tolist() for device in EVERY]
    torch.cuda.set_rng_state_all(states)
    assert [torch.rand(2, device=device).tolist() for device in EVERY] == again
    generator = torch.Generator("cuda:2").manual_seed(5)
    assert torch.randn(3, device="cuda:2", generator=generator).tolist() == first[0]
    with pytest.raises(
        RuntimeError, match="Expected a generator of the device that draws, but found one of 'cuda:2'"
    ):
        torch.randn(3, device="cuda:0", generator=generator)
    assert torch.randn(3, device="cuda:0").shape == (3,)


def test_saved_and_loaded(spread: Any, tmp_path: Any) -> None:
    saved = {device: torch.randn(3, device=device) for device in EVERY}
    torch.save(saved, tmp_path / "file")
    for device, tensor in torch.load(tmp_path / "file").items():
        assert str(tensor.device) == device
        assert torch.equal(tensor.cpu(), saved[device].cpu())
    onto = torch.load(tmp_path / "file", map_location="cuda:2")
    assert {str(tensor.device) for tensor in onto.values()} == {"cuda:2"}


def test_events_of_two_servers_have_no_time_between_them(spread: Any) -> None:
    events = []
    for device in EVERY:
        with torch.cuda.device(device):
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            events[-1].synchronize()
    assert events[1].query()
    assert events[1].elapsed_time(events[1]) == 0
    with pytest.raises(RuntimeError, match="GPUs on different servers"):
        events[0].elapsed_time(events[2])


def test_compiled_programs_run_where_their_tensors_are(spread: Any) -> None:
    program = torch.compile(lambda x: (x.sin() + 1).sum(0), backend="gpupool")
    local = torch.randn(4, 3)
    for device in EVERY:
        torch.testing.assert_close(program(local.to(device)).cpu(), (local.sin() + 1).sum(0))


def test_limits_and_what_is_over_them(spread: Any) -> None:
    before = attachment.attached().spec
    devices = tuple(dataclasses.replace(d, limit_mib=1 + d.index) for d in before.devices)
    session.resize(dataclasses.replace(before, devices=devices))
    for index, device in enumerate(EVERY):
        assert torch.cuda.get_device_properties(device).total_memory == 1 + index << 20
        with pytest.raises(torch.OutOfMemoryError, match=f"GPU {index} .*capacity of {1 + index}"):
            torch.empty(1 + index << 20, dtype=torch.uint8, device=device).new_empty(1 << 20)
    assert session.settle(before) == [0, 0, 0]


def test_an_error_at_one_server_is_raised_there_and_the_others_go_on(spread: Any) -> None:
    bad = torch.linalg.inv(torch.zeros(2, 2, device="cuda:2"))
    assert torch.ones(2, device="cuda:0").sum().item() == 2
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        torch.cuda.synchronize()
        bad.cpu()
    assert torch.ones(2, device="cuda:2").sum().item() == 2


def test_tensors_come_home_from_all_of_them(spread: Any) -> None:
    tensors = [torch.full((2,), float(n), device=device) for n, device in enumerate(EVERY)]
    ours = [t for t in evacuate.live() if any(t is one for one in tensors)]
    assert len(ours) == 3
    assert not evacuate.bring_home(ours)
    assert [t.tolist() for t in tensors] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert {t.device.type for t in tensors} == {"cpu"}


def test_one_worker_that_dies_ends_the_whole_of_it(spread: Any, eventually: Callable) -> None:
    told: list[str] = []

    def lose(reason: str) -> None:
        told.append(reason)
        session.lose(reason)

    line = Lifeline(attachment.attached().spec, lose)
    x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    assert x.sum().item() == y.sum().item() == 3
    assert line.alive
    spread[1].kill()
    eventually(lambda: told, "the holder hears of it")
    assert told == ["the worker went away without a word"] == [line.lost]
    assert not line.alive
    for tensor in (x, y):
        with pytest.raises(
            WorkerGone, match="gone .the worker went away without a word.; its tensors are lost"
        ):
            tensor.sum().item()
    assert spread[0].alive(), "the pool ends it, as part of a lease that is lost"
    line.release()
    assert spread[0].exit_code() == 0


def test_released_at_once(start_worker: Callable, eventually: Callable) -> None:
    workers = [start_worker(1), start_worker(1, first=1)]
    one, two = (worker.spec for worker in workers)
    addresses = ((one.host, one.port), (two.host, two.port))
    spec = dataclasses.replace(one, devices=(*one.devices, *two.devices), addresses=addresses)
    assert type(spec).from_json(spec.to_json()) == spec
    assert [part.devices for part in spec.parts()] == [one.devices, two.devices]
    told: list[str] = []
    line = Lifeline(spec, told.append)
    line.release()
    assert [worker.exit_code() for worker in workers] == [0, 0]
    assert not told
    assert not line.lost
