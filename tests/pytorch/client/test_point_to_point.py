"""Tensors that ranks of a lease send to each other, in two processes of it, against gloo between two of the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the device is PyTorch's")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe  # noqa: E402

from jupyter_gpupool.pytorch.client.dispatch import ranks  # noqa: E402
from tests.conftest import PATIENCE_S  # noqa: E402

from .two_ranks import DTYPES, SHAPES, compare, digits, elements, run  # noqa: E402


def messages(device: str, rank: int) -> dict[str, Any]:
    """What arrives at this rank."""
    other, found = 1 - rank, {}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        mine, got = elements(shape, dtype, rank).to(device), torch.zeros(shape, dtype=dtype, device=device)
        if rank == 0:
            dist.send(mine, other)
            dist.recv(got, other)
        else:
            dist.recv(got, other)
            dist.send(mine, other)
        found[f"{shape} {dtype}"] = digits(got)
    rows = torch.arange(12.0, device=device).reshape(3, 4) + 100 * rank
    # Both receive before they send, and wait for the last one first.
    got = [torch.zeros(3, device=device) for _ in range(3)]
    receives = [dist.irecv(got[k], other, tag=k) for k in range(3)]
    sends = [dist.isend(rows[:, k].contiguous(), other, tag=k) for k in (2, 0, 1)]
    for work in (*reversed(receives), *sends):
        work.wait()
    found["by tag"] = [digits(t) for t in got]
    # Of one tag they come in order; what is sent is what it was.
    a, b, changing = torch.zeros(4, device=device), torch.zeros(4, device=device), rows[0].clone()
    works = [dist.irecv(a, other), dist.irecv(b, other)]
    dist.isend(changing, other).wait()
    changing += 1
    dist.isend(changing, other).wait()
    works[1].wait()
    works[0].wait()
    found["in order"] = [digits(a), digits(b)]
    batch = [dist.P2POp(dist.irecv, a, other), dist.P2POp(dist.isend, rows[1].contiguous(), other)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    found["batch"] = digits(a)
    complex_ones = torch.complex(rows[0], rows[1])
    work = dist.irecv(got_complex := torch.zeros_like(complex_ones), other)
    sent = dist.isend(complex_ones, other)
    work.wait()
    sent.wait()
    found["complex"] = digits(got_complex)
    if rank == 0:
        dist.send(rows[2], other)
    else:
        assert dist.recv(a, other) == other
        found["from a named rank"] = digits(a)
    things: list[Any] = ["from 0", {"rank": 0}] if rank == 0 else [None, None]
    if rank == 0:
        dist.send_object_list(things, 1, device=torch.device(device))
    else:
        dist.recv_object_list(things, 0, device=torch.device(device))
    found["objects"] = things
    if rank == 0:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, rows[0], other)])[0].wait()
    else:
        dist.batch_isend_irecv([dist.P2POp(dist.irecv, a, other)])[0].wait()
        found["one way"] = digits(a)
    return found


def coalesced(device: str, rank: int) -> dict[str, Any]:
    """What collectives that are called together leave."""
    tensors = [torch.arange(3.0, device=device) + rank + k for k in range(3)]
    with dist._coalescing_manager():
        for t in tensors:
            dist.all_reduce(t)
    inputs = [torch.arange(2.0, device=device) + 10 * rank + k for k in range(2)]
    outputs = [torch.zeros(4, device=device) for _ in range(2)]
    with dist._coalescing_manager(async_ops=True) as together:
        for out, t in zip(outputs, inputs):
            dist.all_gather_into_tensor(out, t)
    together.wait()
    return {"all_reduce": [digits(t) for t in tensors], "all_gather": [digits(t) for t in outputs]}


def pipeline(device: str, rank: int) -> dict[str, Any]:
    """Losses and gradients of a network with half of its layers at each rank, by two schedules."""
    found = {}
    for schedule in (ScheduleGPipe, Schedule1F1B):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Linear(16, 3)][rank].to(device)
        stage = PipelineStage(layers, rank, 2, torch.device(device))
        steps = schedule(stage, 4, loss_fn=nn.MSELoss())
        optimizer = torch.optim.SGD(layers.parameters(), 0.1)
        losses: list[Any] = []
        for step in range(3):
            optimizer.zero_grad()
            if rank == 0:
                steps.step(elements((8, 6), torch.float32, step).to(device))
            else:
                kept: list[Any] = []
                steps.step(target=elements((8, 3), torch.float32, step).to(device), losses=kept)
                losses += [loss.item() for loss in kept]
            optimizer.step()
        found[schedule.__name__] = [losses, *(digits(p) for p in layers.parameters())]
    return found


PARTS = {"messages": messages, "coalesced": coalesced, "pipeline": pipeline}


def test_as_gloo_on_the_cpu(start_worker: Callable, tmp_path: Path) -> None:
    compare(start_worker().spec, tmp_path, PARTS)


@pytest.fixture
def two_servers(start_worker: Callable) -> Any:
    """A lease with a slice on each of two servers."""
    one, two = start_worker(1).spec, start_worker(1, first=1).spec
    addresses = tuple((part.host, part.port) for part in (one, two))
    return dataclasses.replace(one, devices=(*one.devices, *two.devices), addresses=addresses)


def test_between_two_servers_as_gloo_on_the_cpu(two_servers: Any, tmp_path: Path) -> None:
    compare(two_servers, tmp_path, {"messages": messages})


def begun_at_once(device: str, rank: int) -> dict[str, Any]:
    """What ranks get that begin everything before either knows where the other's slice is."""
    other = 1 - rank
    mine = [torch.arange(4.0, device=device) + 10 * rank + k for k in range(3)]
    got = [torch.zeros(4, device=device) for _ in range(3)]
    receives = [dist.irecv(t, other) for t in got]
    sends = [dist.isend(t, other) for t in mine]
    for work in (*reversed(receives), *sends):
        work.wait()
    return {"got": [digits(t) for t in got]}


def batch_at_once(device: str, rank: int) -> dict[str, Any]:
    """As :func:`begun_at_once`, in batches: of ranks that do not know each other, and of ranks that do."""
    other, found = 1 - rank, {}
    for name in ("first", "second"):
        mine, got = torch.arange(4.0, device=device) + 10 * rank, torch.zeros(4, device=device)
        batch = [dist.P2POp(dist.irecv, got, other), dist.P2POp(dist.isend, mine, other)]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        found[name] = digits(got)
    return found


def test_ranks_of_two_servers_may_begin_everything_first(two_servers: Any, tmp_path: Path) -> None:
    compare(two_servers, tmp_path, {"at once": begun_at_once, "batch": batch_at_once})


def sent_around(device: str, rank: int) -> dict[str, Any]:
    """What ranks 0 and 2 of a server and 1 of another one get that send in a ring; rank 1 begins last."""
    mine, got, host = torch.full((3,), rank, device=device), torch.zeros(3, device=device), torch.zeros(1)
    if rank == 0:
        work = dist.isend(mine.float(), 1)
        dist.recv(got, 2)  # in the worker, which makes the operators after it wait
        dist.send(host, 1, tag=7)
        work.wait()
    else:
        if rank == 1:
            dist.recv(host, 0, tag=7)
        dist.recv(got, rank - 1)
        dist.send(mine.float(), (rank + 1) % 3)
    return {"got": got.tolist()}


def received_around(device: str, rank: int) -> dict[str, Any]:
    """As :func:`sent_around`, where rank 1 sends to both and rank 0 has begun to receive from it."""
    mine, got, host = torch.full((3,), rank, device=device), torch.zeros(3, device=device), torch.zeros(1)
    first = torch.zeros(3, device=device)
    if rank == 0:
        work = dist.irecv(first, 1)
        dist.recv(got, 2)
        dist.send(host, 1, tag=7)
        work.wait()
    elif rank == 1:
        dist.recv(host, 0, tag=7)
        dist.send(mine.float(), 0)
        dist.send(mine.float(), 2)
    else:
        dist.recv(first, 1)
        dist.send(mine.float(), 0)
    return {"first": first.tolist(), "got": got.tolist()}


def test_a_rank_may_wait_in_its_worker_for_what_depends_on_the_other_server(
    start_worker: Callable, tmp_path: Path
) -> None:
    one, two = start_worker(2).spec, start_worker(1, first=2).spec
    addresses = tuple((part.host, part.port) for part in (one, one, two))
    spec = dataclasses.replace(one, devices=(*one.devices, *two.devices), addresses=addresses)
    parts = {"sent": sent_around, "received": received_around}
    found = run(spec, tmp_path / "store", parts, slices=(0, 2, 1))
    assert [found[rank]["sent"]["got"] for rank in range(3)] == [[2.0] * 3, [0.0] * 3, [1.0] * 3]
    assert found[0]["received"] == {"first": [1.0] * 3, "got": [2.0] * 3}
    assert found[2]["received"]["first"] == [1.0] * 3


def without_gradients(device: str, rank: int) -> dict[str, Any]:
    """What is received in inference mode, and to a leaf that has gradients."""
    found = {}
    for name, mode in (("inference", torch.inference_mode), ("no_grad", torch.no_grad)):
        leaf = torch.zeros(3, device=device, requires_grad=True)
        with mode():
            t = torch.zeros(3, device=device)
            for got in (t, leaf):
                if rank == 0:
                    dist.send(torch.arange(3.0, device=device), 1)
                else:
                    dist.recv(got, 0)
        found[name] = [t.tolist(), leaf.tolist()]
    return found


def test_between_two_servers_without_gradients(two_servers: Any, tmp_path: Path) -> None:
    compare(two_servers, tmp_path, {"without": without_gradients})


def sent_before_an_error(device: str, rank: int) -> dict[str, Any]:
    """What becomes of a send when an operator after it fails, before the other rank exchanges anything."""
    from jupyter_gpupool.pytorch.client.tensor.command_stream import stream_of

    host, t = torch.zeros(1), torch.zeros(3, device=device)
    if rank == 0:
        work = dist.isend(torch.arange(3.0, device=device), 1)
        torch.index_select(t, 0, torch.tensor([7], device=device))
        stream = stream_of(t._storage)
        deadline = time.monotonic() + PATIENCE_S
        while not stream._trouble and time.monotonic() < deadline:
            time.sleep(0.02)  # the worker's report is on its way
        dist.send(host, 1, tag=7)
        dist.recv(host, 1, tag=8)  # it has arrived
        with pytest.raises(IndexError):
            torch.cuda.synchronize()
        work.wait()
    else:
        dist.recv(host, 0, tag=7)
        dist.recv(t, 0)
        dist.send(host, 0, tag=8)
    return {"got": t.tolist()}


def test_an_error_does_not_keep_what_was_sent_before_it(two_servers: Any, tmp_path: Path) -> None:
    found = run(two_servers, tmp_path / "store", {"sent": sent_before_an_error})
    assert found[1]["sent"]["got"] == [0, 1, 2]


def sent_before_a_group(device: str, rank: int) -> dict[str, Any]:
    """What arrives at a rank while the one that has sent it waits for it to make a group."""
    t, host = torch.arange(3.0, device=device), torch.zeros(1)
    if rank == 0:
        work = dist.isend(t + 1, 1)
        dist.send(host, 1, tag=7)
        dist.new_group([0, 1])
        work.wait()
    else:
        dist.recv(host, 0, tag=7)
        dist.recv(t, 0)
        dist.new_group([0, 1])
    return {"got": t.tolist()}


def test_what_is_sent_arrives_while_the_sender_waits_at_the_store(two_servers: Any, tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = run(two_servers, tmp_path / "store", {"sent": sent_before_a_group}, port=store.port)
    assert found[1]["sent"]["got"] == [1, 2, 3]


def test_who_sends_is_told_of_cards_after_an_error_of_the_store(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., Any]
) -> None:
    monkeypatch.setattr(ranks, "_places", [str])
    monkeypatch.setattr(ranks, "_peers", [lambda index: ""])

    class Store(dist.HashStore):
        fails = False

        def check(self, keys: list[str]) -> bool:
            if self.fails and threading.current_thread() is not threading.main_thread():
                raise dist.DistStoreError("reset by peer")
            return super().check(keys)

    @dataclasses.dataclass
    class Group:
        store: Store
        of: int

        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return self.of

        def get_group_store(self) -> Store:
            return self.store

    store = Store()
    one, two = (ranks.Ranks(Group(store, rank), 60.0, rank) for rank in range(2))
    told: list[str] = []
    store.fails = True
    one.when_known(1, lambda: told.append("first"))
    eventually(lambda: one._watcher is None, "the thread has ended")
    store.fails = False
    one.when_known(1, lambda: told.append("second"))
    two.publish()
    eventually(lambda: told == ["first", "second"], "both are told")


def sent_ahead(device: str, rank: int) -> dict[str, Any]:
    """Bytes that the slice has less after messages that began before the other rank exchanged anything.

    The rank that sends does not wait for its works until they have arrived.
    """
    other, nbytes = 1 - rank, 8 << 20
    free = torch.cuda.mem_get_info(rank)[0]
    host = torch.zeros(1)
    if rank == 0:
        x = torch.arange(nbytes // 4, device=device, dtype=torch.float32)
        works = [dist.isend(x, other, tag=k) for k in range(2)]
        meanwhile = free - torch.cuda.mem_get_info(rank)[0]
        dist.send(host, other, tag=7)
        dist.recv(host, other, tag=8)  # they have arrived
        for work in works:
            work.wait()
        del x, works, work
    else:
        dist.recv(host, other, tag=7)
        got = [torch.zeros(nbytes // 4, device=device) for _ in range(2)]
        for k, t in enumerate(got):
            dist.recv(t, other, tag=k)
        assert all(t[-1].item() == nbytes // 4 - 1 for t in got)
        dist.send(host, other, tag=8)
        meanwhile = 0
        del got, t
    deadline = time.monotonic() + PATIENCE_S
    while (kept := free - torch.cuda.mem_get_info(rank)[0]) and time.monotonic() < deadline:
        time.sleep(0.02)  # what has copied it from the host is just ending
    return {"meanwhile": meanwhile // nbytes, "kept": kept}


@pytest.mark.parametrize("servers", [1, 2])
def test_what_is_sent_leaves_no_memory(
    start_worker: Callable, request: Any, tmp_path: Path, servers: int
) -> None:
    spec = start_worker().spec if servers == 1 else request.getfixturevalue("two_servers")
    found = run(spec, tmp_path / "store", {"sent": sent_ahead})
    assert found[0]["sent"] == {"meanwhile": 3, "kept": 0}, "the tensor and two copies"
    assert found[1]["sent"]["kept"] == 0


def absent(device: str, rank: int) -> dict[str, Any]:
    """What a rank hears that exchanges tensors with one that does not."""
    from jupyter_gpupool.pytorch.client.dispatch import worker_collectives

    group = dist.new_group([0, 1])
    worker_collectives.stand_in(group, 2.0)  # gloo needs more to make a group on a busy machine
    found: dict[str, Any] = {}
    if rank == 0:
        x = torch.ones(2, device=device)
        for name, call in (
            ("recv", lambda: dist.recv(x, 1, group)),
            ("all_reduce", lambda: dist.all_reduce(x, group=group)),
        ):
            with pytest.raises(RuntimeError) as caught:
                call()
            found[name] = str(caught.value)
        found["goes on"] = (x * 2).tolist()
    dist.barrier()
    return found


def test_who_exchanges_nothing_is_named(start_worker: Callable, tmp_path: Path) -> None:
    found = run(start_worker().spec, tmp_path / "store", {"absent": absent})
    said = "rank 0 waited 2 s for rank 1 to exchange tensors"
    assert found[0]["absent"] == {"recv": said, "all_reduce": said, "goes on": [2, 2]}
