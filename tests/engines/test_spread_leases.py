"""Leases that span servers are parked and moved while their programs compute, which do not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="workers need PyTorch")

from jupyter_gpupool.core.environment import LEASE  # noqa: E402
from jupyter_gpupool.core.errors import EngineError  # noqa: E402
from jupyter_gpupool.core.files import write_atomically  # noqa: E402
from jupyter_gpupool.core.models import LeaseState  # noqa: E402
from jupyter_gpupool.pytorch.client import session  # noqa: E402
from jupyter_gpupool.pytorch.client.dispatch import attachment  # noqa: E402
from jupyter_gpupool.transport.lifeline import Lifeline  # noqa: E402

from ..conftest import often  # noqa: E402
from ..pytorch.client.two_ranks import run  # noqa: E402
from ..support.certificates import Certificates  # noqa: E402
from ..support.farm_in_process import Farm  # noqa: E402
from ..support.processes import runs  # noqa: E402

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def whole_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("farm")
        farm = Farm(NAMES, folder, patch, park_memory_mib=64, certfile=str(certificates.certfile))
        yield farm
        farm.stop()


@pytest.fixture
def farm(whole_farm: Farm, eventually: Callable[..., Any]) -> Iterator[Farm]:
    yield whole_farm
    for lease_id in list(whole_farm.engine._parts):
        whole_farm.do(whole_farm.engine.stop_worker(lease_id))
    eventually(lambda: not whole_farm.shares(), "no share is left")
    whole_farm.ended.clear()


class Program:
    """A lease of four slices on two servers, which this process holds and is attached to."""

    def __init__(self, farm: Farm, file: Path) -> None:
        self.farm = farm
        self.lease = farm.lease(("alpha", 0), ("alpha", 1), ("beta", 0), ("beta", 1))
        self.pids = set(self.workers().values())
        self._file = file
        self._write()

    def _write(self) -> None:
        """What a holder does once its pool knows where the lease is."""
        write_atomically(self._file, self.farm.spec(self.lease).to_json())

    def workers(self) -> dict[str, int]:
        assert self.lease.worker is not None
        return {piece.server: self.lease.worker.on(piece.server).pid for piece in self.lease.slices}

    def move(self, which: int) -> None:
        """The part on its first or its second server, to the one where it has nothing."""
        left = list(self.workers())[which]
        (reached,) = set(NAMES) - set(self.workers())
        self.lease = self.farm.move(self.lease, left, reached)
        self.pids.update(self.workers().values())
        self._write()

    def park(self) -> None:
        self.farm.do(self.farm.engine.park_worker(self.lease))

    def resume(self) -> None:
        self.farm.do(self.farm.engine.resume_worker(self.lease))

    def check_places(self, eventually: Callable[..., Any]) -> None:
        """Its workers are where it is, and nothing else is left."""
        assert self.lease.id not in self.farm.ended
        assert self.farm.shares() == {self.lease.id: 4}
        former = self.pids - set(self.workers().values())
        eventually(lambda: not any(map(runs, former)), "former workers have ended")
        assert all(map(runs, self.workers().values()))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LEASE, str(tmp_path / "lease.json"))
    return tmp_path / "lease.json"


@pytest.fixture
def program(farm: Farm, file: Path) -> Iterator[Program]:
    program = Program(farm, file)
    line = Lifeline(farm.spec(program.lease), locate=lambda: farm.spec(program.lease))
    session.activate(farm.spec(program.lease))
    yield program
    session.deactivate()
    line.release()


def training(steps: int, between: Callable[[], object] = lambda: None) -> list[bytes]:
    """The digits of each loss and of the parameters of a network that has its layers on two servers."""
    torch.manual_seed(5)
    first, last = torch.nn.Linear(20, 30).to("cuda:0"), torch.nn.Linear(30, 4).to("cuda:2")
    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters()], lr=0.01)
    found = []
    for _ in range(steps):
        between()
        optimizer.zero_grad()
        hidden = torch.nn.functional.dropout(first(torch.randn(16, 20, device="cuda:0")).relu())
        loss = last(hidden.to("cuda:2")).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    parameters = [*first.parameters(), *last.parameters()]
    return [repr(found).encode(), *(p.detach().cpu().numpy().tobytes() for p in parameters)]


def beside(disturb: Callable[[int], None], compute: Callable[[], Any]) -> tuple[Any, int]:
    """What ``compute`` returns while another thread calls ``disturb`` again and again, and how often it did."""
    over, count, failures = threading.Event(), 0, []

    def disturb_all_the_time() -> None:
        nonlocal count
        while not over.wait(0.01):
            try:
                disturb(count)
                count += 1
            except BaseException as e:
                failures.append(e)
                return

    thread = threading.Thread(target=disturb_all_the_time)
    thread.start()
    try:
        found = compute()
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
    return found, count


@pytest.mark.soak
@pytest.mark.parametrize("what", ["park", "move", "both"])
def test_a_program_gets_the_same_digits_while_its_lease_is_parked_and_moved_all_the_time(
    what: str, program: Program, eventually: Callable[..., Any]
) -> None:
    steps = often(8, 200)
    undisturbed = training(steps)
    done = threading.Semaphore(0)

    def disturb(count: int) -> None:
        if what != "move":
            program.park()
        if what == "park":
            program.resume()
        elif what == "move" or count % 2:
            program.move(count // 2 % 2)
        else:
            program.resume()
        done.release()

    found, count = beside(disturb, lambda: training(steps, done.acquire))
    assert found == undisturbed
    assert count >= steps
    program.check_places(eventually)


def exchanging(device: str, rank: int) -> dict[str, Any]:
    """Training in DistributedDataParallel, messages from rank to rank, and what a group of some ranks sums."""
    import torch.distributed as dist
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 3)).to(device)
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    few = dist.new_group([0, 2])
    losses, size = [], dist.get_world_size()
    batch = torch.rand(20, 16, 10, generator=torch.Generator().manual_seed(rank)).to(device)
    passed = torch.zeros(5, device=device)
    for x in batch:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        if rank:
            dist.recv(passed, rank - 1)
        passed += loss.detach()
        if rank < size - 1:
            dist.send(passed, rank + 1)
        if rank != 1:
            dist.all_reduce(passed, group=few)
        losses.append(loss.item())
    parameters = [p.detach().cpu().numpy().tobytes() for p in model.parameters()]
    return {"losses": losses, "passed": passed.tolist(), "parameters": parameters}


def test_ranks_exchange_the_same_digits_while_their_lease_is_moved_and_parked(
    farm: Farm, file: Path, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    program = Program(farm, file)
    line = Lifeline(farm.spec(program.lease), locate=lambda: farm.spec(program.lease))
    parts, slices = {"exchanging": exchanging}, (0, 2, 1)
    undisturbed = run(farm.spec(program.lease), tmp_path / "undisturbed", parts, slices)
    refused: list[str] = []

    def disturb(count: int) -> None:
        if count >= 15:
            return
        try:
            if count % 3 == 2:
                program.park()
                program.resume()
            else:
                program.move(count % 2)
        except EngineError as e:
            refused.append(str(e))

    found, count = beside(disturb, lambda: run(farm.spec(program.lease), tmp_path / "store", parts, slices))
    assert found == undisturbed
    assert count - len(refused) >= 3, refused
    assert all("too long" in why or "attached" in why for why in refused), refused
    program.check_places(eventually)
    line.release()


def test_a_copy_does_not_pass_the_program_after_a_move(program: Program) -> None:
    x = torch.arange(100_000.0, device="cuda:0")
    assert torch.equal(x.to("cuda:2").cpu(), torch.arange(100_000.0))
    program.move(0)
    program.move(1)
    torch.cuda.synchronize("cuda:0")
    before = [stream.bytes_up + stream.bytes_down for stream in attachment.streams()]
    y = x.to("cuda:3") + 1
    torch.cuda.synchronize("cuda:3")
    assert [stream.bytes_up + stream.bytes_down for stream in attachment.streams()] == before
    assert torch.equal(y.cpu(), torch.arange(100_000.0) + 1)


def test_a_parked_lease_of_which_a_part_moves_runs_whole(
    program: Program, eventually: Callable[..., Any]
) -> None:
    tensors = [torch.arange(1000.0, device=f"cuda:{k}") + k for k in range(4)]
    torch.cuda.synchronize("cuda:0")
    torch.cuda.synchronize("cuda:2")
    program.park()
    assert program.farm.engine.parked() == {program.lease.id} and program.farm.shares() == {}
    program.lease = replace(program.lease, state=LeaseState.PARKED)
    program.move(0)
    assert program.farm.engine.parked() == set()
    total = sum((t.to("cuda:3") for t in tensors), torch.zeros(1000, device="cuda:3"))
    assert torch.equal(total.cpu(), torch.arange(1000.0) * 4 + 6)
    program.check_places(eventually)


def test_a_part_that_cannot_be_parked_lets_none_be_parked(
    program: Program, eventually: Callable[..., Any]
) -> None:
    small = torch.ones(1000, device="cuda:0")
    large = torch.ones(20 << 20, device="cuda:2")  # 80 MiB, and beta has 64 MiB of host memory
    assert large.sum().item() == 20 << 20
    with pytest.raises(EngineError, match="MiB of host memory are needed"):
        program.park()
    assert program.farm.engine.parked() == set()
    assert (small.to("cuda:2") * 2).sum().item() == 2000
    program.check_places(eventually)


@pytest.mark.parametrize("when", ["sent", "linked"])
def test_a_target_that_dies_leaves_the_lease_whole_where_it_was(
    when: str, program: Program, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    from jupyter_gpupool.engines.ray import together

    x = torch.arange(1000.0, device="cuda:0")
    assert x.to("cuda:2").sum().item() == 499500.0
    nodes = {node.name: node for node in program.farm.engine._nodes.values()}
    until_linked = together._until_linked

    async def kill(lease_id: str, node: Any) -> None:
        if when == "linked":
            await until_linked(lease_id, node)
        os.kill(nodes["gamma"].workers[lease_id].pid, signal.SIGKILL)
        if when == "sent":
            await until_linked(lease_id, node)

    lease = program.lease
    with monkeypatch.context() as patch:
        patch.setattr(together, "_until_linked", kill)
        with pytest.raises(EngineError, match="gamma"):
            program.move(0)
    assert (x.to("cuda:2") + 1).sum().item() == 500500.0
    assert program.lease == lease
    program.check_places(eventually)
    program.move(0)
    assert (x.to("cuda:2") + 1).sum().item() == 500500.0
    program.check_places(eventually)


def test_a_source_that_dies_while_it_is_moved_is_lost_with_one_line(
    program: Program, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    from jupyter_gpupool.engines.ray import together

    until_linked, lease = together._until_linked, program.lease

    async def kill(lease_id: str, node: Any) -> None:
        os.kill(program.workers()["alpha"], signal.SIGKILL)
        while lease_id in program.farm.engine._parts:
            await asyncio.sleep(0.01)
        await until_linked(lease_id, node)

    monkeypatch.setattr(together, "_until_linked", kill)
    with pytest.raises(EngineError):
        program.move(0)
    assert program.farm.ended[lease.id] == (
        LeaseState.LOST,
        "its worker was killed by SIGKILL on GPU server alpha; what the lease had on beta ended with it",
    )
    eventually(lambda: not any(map(runs, program.pids)) and not program.farm.shares(), "nothing is left")


def test_a_pool_that_is_killed_while_it_moves_a_lease_finds_it_whole(
    program: Program, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    from jupyter_gpupool.engines.ray import together

    x = torch.arange(1000.0, device="cuda:0")
    assert x.to("cuda:2").sum().item() == 499500.0
    farm, lease = program.farm, program.lease
    reached = threading.Event()

    async def stop_here(lease_id: str, node: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    moving = farm.moving(lease, "alpha", "gamma")
    with monkeypatch.context() as patch:
        patch.setattr(together, "_until_linked", stop_here)
        work = farm.begin(farm.engine.move_worker(moving))
        assert reached.wait(300)
    farm.restart()
    assert farm.do(farm.engine.adopt([moving])) == {lease.id: lease.worker}
    work.cancel()
    assert (x.to("cuda:2") + 1).sum().item() == 500500.0
    program.check_places(eventually)
