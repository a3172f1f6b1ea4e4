"""A pool on three Ray nodes: where leases go, and what becomes of them when something dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jupyter_gpupool.core import torch_release
from jupyter_gpupool.core.errors import ImpossibleRequest, LeaseEnded, PoolError
from jupyter_gpupool.core.models import Lease, LeaseState
from jupyter_gpupool.transport.lifeline import Lifeline

from ...conftest import often
from ...support import other_release
from ...support.processes import runs
from .conftest import NAMES, Farm, Pool, ask, spec_of

#: How soon the leases of a lost GPU server must be LOST, in seconds; a busy machine is given more.
LOST_WITHIN_S = 180


def shares() -> dict[str, list[float]]:
    """What Ray has given to this pool, by lease."""
    found: dict[str, list[float]] = {}
    for group in placement_group_table().values():
        if group["name"].startswith("gpupool:") and group["state"] != "REMOVED":
            found.setdefault(group["name"].split(":")[2], []).append(group["bundles"][0]["GPU"])
    return found


def node_of(farm: Farm, name: str) -> str:
    return farm.nodes[name].node_id


def free_gpus(farm: Farm, name: str) -> float:
    from ray._private.state import available_resources_per_node

    return available_resources_per_node().get(node_of(farm, name), {}).get("GPU", 0.0)


def state(pool: Pool, lease: Lease) -> LeaseState:
    return pool.client.lease(lease.id).state


@pytest.fixture(autouse=True)
def all_is_free_again(pool: Pool, farm: Farm, eventually: Callable) -> Any:
    yield
    pool.let_go()
    eventually(lambda: pool.granted_mib() == 0, "the ledger has nothing granted")
    eventually(lambda: not shares(), "Ray has nothing given to the pool")
    eventually(lambda: all(free_gpus(farm, name) == 2.0 for name in farm.nodes), "every GPU is free in Ray")


def test_a_lease_holds_its_share_of_exactly_its_node(pool: Pool, farm: Farm, eventually: Callable) -> None:
    lease, line = pool.hold(ask(0.4, 2, filters={"server": "beta"}))
    assert [(piece.server, piece.index) for piece in lease.slices] == [("beta", 0), ("beta", 1)]
    assert lease.worker is not None and lease.worker.host == farm.nodes["beta"].node_ip_address
    assert shares() == {lease.id: [0.4, 0.4]}
    eventually(lambda: round(free_gpus(farm, "beta"), 4) == 1.2, "Ray knows it, too")
    assert psutil.Process(lease.worker.pid) in farm.processes("beta")
    eventually(lambda: not any(gpu["taken_mib"] for gpu in pool.gpus()), "the pool knows it has all of it")
    resized = pool.client.resize(lease.id, partial=0.5)
    assert {piece.memory_mib for piece in resized.slices} == {16255}
    eventually(lambda: round(free_gpus(farm, "beta"), 4) == 1.0, "the shares grow in Ray")
    pool.client.resize(lease.id, partial=0.1)
    eventually(lambda: round(free_gpus(farm, "beta"), 4) == 1.8, "and shrink there")
    line.release()


def test_a_lease_computes_with_the_release_of_its_client(pool: Pool) -> None:
    marks = [torch_release.mark(release) for release in (other_release.OTHER, torch_release.installed())]
    leases = [pool.hold(ask(0.1, client=f"host:1{mark}"))[0] for mark in marks]
    assert [lease.worker.environment for lease in leases if lease.worker] == ["other", "default"]
    shown = [pool.client.lease(lease.id).to_json() for lease in leases]
    assert {lease["torch"] for lease in shown} == {torch_release.installed()}


def test_every_server_is_asked_for_its_health(pool: Pool, eventually: Callable) -> None:
    def read() -> dict[str, dict]:
        checks = pool.client.health()["checks"]
        return {c["server"]: c for c in checks if c["name"] == "memory available" and c["value"] is not None}

    eventually(lambda: {"alpha", "beta", "gamma"} <= set(read()), "each node's own account has come")
    clocks = [c for c in pool.client.health()["checks"] if c["name"] == "clock"]
    assert len(clocks) == 3 and all(c["value"] < 5 for c in clocks), "one machine has one clock"


def test_a_lease_moves_to_make_room_for_a_request_and_its_program_goes_on(pool: Pool) -> None:
    torch = pytest.importorskip("torch")
    from jupyter_gpupool.pytorch.client import session

    full, full_line = pool.hold(ask(1.0, 2, filters={"server": "gamma"}))
    lease, line = pool.hold(ask(0.4))
    other = {"alpha": "beta", "beta": "alpha"}[lease.slices[0].server]
    pinned, pinned_line = pool.hold(ask(0.4, filters={"server": other}))
    session.activate(spec_of(lease))
    try:
        x = torch.arange(1000.0, device="cuda")
        assert x.sum().item() == 499500.0
        large, large_line = pool.hold(ask(1.0, 2))
        assert {piece.server for piece in large.slices} == {lease.slices[0].server}
        assert pool.client.lease(lease.id).slices[0].server == other
        assert (x + 1).sum().item() == 500500.0
        assert pool.client.lease(pinned.id).slices == pinned.slices
    finally:
        session.deactivate()
    for one in (full_line, line, pinned_line, large_line):
        one.release()


def test_a_worker_that_is_killed(pool: Pool, eventually: Callable) -> None:
    victim, line = pool.hold(ask(0.5))
    other, other_line = pool.hold(ask(0.5))
    assert victim.worker is not None
    os.kill(victim.worker.pid, signal.SIGKILL)
    ended = eventually(lambda: state(pool, victim).ended and pool.client.lease(victim.id), "its lease ends")
    assert (ended.state, ended.reason) == (LeaseState.LOST, "its worker was killed by SIGKILL")
    eventually(lambda: line.lost, "its holder hears of it")
    with pytest.raises(LeaseEnded, match="SIGKILL"):
        pool.client.heartbeat(victim.id)
    assert state(pool, other) is LeaseState.ACTIVE and other_line.alive
    other_line.release()


def losses(between: Callable[[], object] = lambda: None) -> list[float]:
    """A small program on the lease that is attached to this process."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        between()
    return found


def test_a_drained_server_is_left_by_its_leases_and_their_programs_go_on(
    pool: Pool, farm: Farm, eventually: Callable
) -> None:
    from jupyter_gpupool.pytorch.client import session

    lease, line = pool.hold(ask(0.4))
    pinned, pinned_line = pool.hold(ask(0.3, filters={"server": lease.slices[0].server}))
    session.activate(spec_of(lease))
    try:
        undisturbed = losses()
        places: list[str] = []

        def move() -> None:
            """To another server, and to yet another."""
            server = pool.client.lease(lease.id).slices[0].server
            if len(places) < 3:
                places.append(server)
                pool.client.drain(server, move=True)
                state = eventually(
                    lambda: (now := pool.client.drained(server))["over"] and now, "all is decided"
                )
                pool.client.drain(server, False)
                moves = {move["lease"]: move for move in state["moves"]}
                assert moves[lease.id]["outcome"] == "moved", moves
                if pinned.id in moves:
                    assert moves[pinned.id]["outcome"] == "stays"
                    assert "its request allows" in moves[pinned.id]["reason"]

        assert losses(move) == undisturbed
        now = pool.client.lease(lease.id)
        places.append(now.slices[0].server)
        assert all(one != other for one, other in zip(places, places[1:])), places
        assert now.worker is not None and lease.worker is not None
        assert psutil.Process(now.worker.pid) in farm.processes(places[-1])
        assert not runs(lease.worker.pid), "the worker that it left has ended"
        assert pool.granted_mib() == 13004 + 9753, "it holds what it held"
        eventually(lambda: shares() == {lease.id: [0.4], pinned.id: [0.3]}, "and Ray knows of no more")
        assert line.alive and pinned_line.alive
        os.kill(now.worker.pid, signal.SIGKILL)
        eventually(lambda: state(pool, lease) is LeaseState.LOST, "its new worker is its worker")
    finally:
        session.deactivate()
    pinned_line.release()


def test_an_idle_lease_is_parked_for_a_request_and_wakes_where_it_was(
    pool: Pool, eventually: Callable
) -> None:
    torch = pytest.importorskip("torch")
    from jupyter_gpupool.pytorch.client import session

    pool.client.create_namespace("idle", {"reclaim": "idle", "limits": {"reclaim_after_s": 1}})
    lease, line = pool.hold(ask(1.0, 2, namespace="idle", filters={"server": "alpha"}))
    session.activate(spec_of(lease))
    try:
        x = torch.arange(1000.0, device="cuda:1")
        assert x.sum().item() == 499500.0
        other, other_line = pool.hold(ask(1.0, 2, filters={"server": "alpha"}))
        assert state(pool, lease) is LeaseState.PARKED
        assert shares() == {other.id: [1.0, 1.0]}, "Ray may give to others what a parked lease had"
        pool.kill()
        pool.start()
        assert (state(pool, lease), state(pool, other)) == (LeaseState.PARKED, LeaseState.ACTIVE)
        assert x.device == torch.device("cuda:1") and state(pool, lease) is LeaseState.PARKED, (
            "no need of a GPU"
        )

        answers: list[float] = []
        computing = threading.Thread(target=lambda: answers.append((x + 1).sum().item()), daemon=True)
        computing.start()
        eventually(lambda: pool.client.lease(lease.id).position == 1, "it waits for its GPUs")
        other_line.release()
        computing.join(300)
        assert answers == [500500.0]
        awake = pool.client.lease(lease.id)
        assert (
            awake.state is LeaseState.ACTIVE and awake.slices == lease.slices and awake.worker == lease.worker
        )
        assert shares() == {lease.id: [1.0, 1.0]}
    finally:
        session.deactivate()
    line.release()
    eventually(lambda: state(pool, lease).ended, "it ends")
    pool.client.delete_namespace("idle")


def test_what_others_have_in_ray_is_not_granted(pool: Pool, farm: Farm, eventually: Callable) -> None:
    @ray.remote(num_cpus=0, num_gpus=1)
    class Other:
        def gpus(self) -> list:
            return ray.get_gpu_ids()

    pinned = NodeAffinitySchedulingStrategy(node_of(farm, "gamma"), soft=False)
    other = Other.options(scheduling_strategy=pinned).remote()
    ray.get(other.gpus.remote(), timeout=300)

    def taken() -> int:
        return sum(gpu["taken_mib"] > 0 for gpu in pool.gpus() if gpu["server"] == "gamma")

    eventually(lambda: taken() == 1, "the pool knows")
    lease, line = pool.hold(ask(1.0, filters={"server": "gamma"}))
    assert shares()[lease.id] == [1.0]
    eventually(lambda: free_gpus(farm, "gamma") == 0.0, "the other one and the lease have all of gamma")
    waiting = pool.client.request(ask(0.1, filters={"server": "gamma"}))
    assert waiting.state is LeaseState.QUEUED
    ray.kill(other)
    granted = eventually(
        lambda: (
            state(pool, waiting) in (LeaseState.ACTIVE, LeaseState.EXPIRED) and pool.client.lease(waiting.id)
        ),
        "what waits is granted when the other one has ended",
    )
    assert granted.granted_at is not None
    line.release()
    pool.client.release(waiting.id)


#: For a lease of several devices, whatever servers they are on.
PROGRAM = """
import copy, torch
from torch import nn
count = torch.cuda.device_count()
devices = [f"cuda:{k}" for k in range(count)]
local = torch.randn(5, 7)
for here in devices:
    for there in devices:
        assert torch.equal(local.to(here).t().to(there).cpu(), local.t()), (here, there)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
x, y = torch.randn(30, 8), torch.randint(0, 3, (30,))
alone = copy.deepcopy(net)
parallel = nn.DataParallel(net.cuda())
for program, target in ((parallel, y.cuda()), (alone, y)):
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(program(x), target)
        loss.backward()
        optimizer.step()
torch.cuda.synchronize()
for a, b in zip(net.parameters(), alone.parameters()):
    torch.testing.assert_close(a.cpu(), b)
print(f"trained on {count}, the loss is {loss.item():.4f}")
"""


def test_one_lease_on_several_servers(pool: Pool, farm: Farm, eventually: Callable) -> None:
    with pytest.raises(ImpossibleRequest, match="no server has more than 2 that fit; ask with --spread"):
        pool.client.request(ask(0.5, 5))
    foreseen = [pool.client.forecast(ask(0.5, 5, spread=spread)) for spread in (False, True)]
    assert [one["outcome"] for one in foreseen] == ["impossible", "granted"]
    assert len({piece.server for piece in pool.hold(ask(0.1, 2, spread=True))[0].slices}) == 1
    pool.let_go()

    lease, line = pool.hold(ask(0.4, 5, spread=True))
    where = [(piece.server, piece.index) for piece in lease.slices]
    # Which of the six is left out is Ray's to say: a GPU that it is slow to give is passed over for a while.
    assert where == sorted(set(where)) and len(where) == 5
    assert {server for server, _ in where} == set(NAMES)
    assert lease.worker is not None and list(lease.worker.elsewhere) == ["beta", "gamma"]
    for name in NAMES:
        worker = lease.worker.on(name)
        assert worker.host == farm.nodes[name].node_ip_address
        assert psutil.Process(worker.pid) in farm.processes(name)
    assert shares() == {lease.id: [0.4] * 5}
    pool.client.resize(lease.id, partial=0.2)
    eventually(lambda: round(free_gpus(farm, "gamma"), 4) == 1.8, "it shrinks on every server")
    line.release()
    eventually(lambda: state(pool, lease) is LeaseState.RELEASED, "it ends")
    eventually(lambda: not any(runs(lease.worker.on(name).pid) for name in NAMES), "all its workers end")


def test_a_program_on_several_servers(pool: Pool) -> None:
    command = [sys.executable, "-m", "jupyter_gpupool", "run", "-n", "5", "-p", "0.2", "--spread", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM],
        env=pool.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "trained on 5" in done.stdout
    assert "Released GPUs on 3 servers" in done.stdout + done.stderr
    assert pool.client.leases() == []


def test_what_goes_between_servers_does_not_pass_the_program(pool: Pool) -> None:
    torch = pytest.importorskip("torch")
    from jupyter_gpupool.pytorch.client import session
    from jupyter_gpupool.pytorch.client.dispatch import attachment

    lease, line = pool.hold(ask(0.4, 6, spread=True))
    assert [piece.server for piece in lease.slices[::2]] == list(NAMES)
    session.activate(spec_of(lease))
    try:
        x = torch.arange(100_000.0, device="cuda:0")
        streams = attachment.streams()
        before = [stream.bytes_up + stream.bytes_down for stream in streams]
        for there in ("cuda:2", "cuda:4", "cuda:1", "cuda:5", "cuda:0"):
            x = x.to(there) + 1
        torch.cuda.synchronize()
        assert [stream.bytes_up + stream.bytes_down for stream in streams] == before
        assert torch.equal(x.cpu(), torch.arange(100_000.0) + 5)
    finally:
        session.deactivate()
    line.release()


def test_a_lease_on_several_servers_is_lost_with_one_of_its_workers(pool: Pool, eventually: Callable) -> None:
    lease, line = pool.hold(ask(0.4, 6, spread=True))
    assert lease.worker is not None
    os.kill(lease.worker.on("beta").pid, signal.SIGKILL)
    eventually(lambda: line.lost, "its holder hears of it")
    lost = eventually(lambda: state(pool, lease).ended and pool.client.lease(lease.id), "it ends")
    assert lost.state is LeaseState.LOST
    assert lost.reason == (
        "its worker was killed by SIGKILL on GPU server beta; what the lease had on alpha, gamma ended with it"
    )
    eventually(lambda: not any(runs(lease.worker.on(name).pid) for name in NAMES), "all its workers end")


def test_a_worker_that_crashes_is_replaced_and_the_others_go_on(pool: Pool, eventually: Callable) -> None:
    import torch

    from jupyter_gpupool.pytorch.client import session

    lease, line = pool.hold(ask(0.4, 6, spread=True))
    assert lease.worker is not None
    former = lease.worker.on("beta")
    session.activate(spec_of(lease))
    try:
        kept, lost = (torch.ones(3, device=f"cuda:{n}") for n in (0, 2))
        assert lost.sum().item() == 3
        os.kill(former.pid, signal.SIGSEGV)
        with pytest.raises(RuntimeError, match="another one has taken its place"):
            while True:
                lost.sum().item()
        assert (kept * torch.ones(3, device="cuda:2").to("cuda:0")).sum().item() == 3
        now = eventually(
            lambda: (known := pool.client.lease(lease.id)).worker != lease.worker and known,
            "the pool knows the new worker",
        )
    finally:
        session.deactivate()
    assert now.state is LeaseState.ACTIVE and line.alive and now.worker is not None
    assert now.worker.on("beta").pid != former.pid and now.worker.on("beta").port == former.port
    assert now.worker.on("gamma") == lease.worker.on("gamma")
    line.release()
    eventually(lambda: not any(runs(now.worker.on(name).pid) for name in NAMES), "all its workers end")


def test_a_drained_server_gets_nothing_new(pool: Pool, eventually: Callable) -> None:
    there, line = pool.hold(ask(0.2, filters={"server": "beta"}))
    pool.client.drain("beta")
    leases = [pool.hold(ask(0.9)) for _ in range(4)]
    assert {piece.server for lease, _ in leases for piece in lease.slices} == {"alpha", "gamma"}
    fifth = pool.client.request(ask(0.5))
    assert fifth.state is LeaseState.QUEUED and state(pool, there) is LeaseState.ACTIVE
    pool.kill()
    pool.start()
    pool.client.heartbeat(fifth.id)
    assert state(pool, fifth) is LeaseState.QUEUED, "the ledger remembers"
    pool.client.drain("beta", False)
    eventually(lambda: state(pool, fifth) is not LeaseState.QUEUED, "it is granted")
    assert pool.client.lease(fifth.id).slices[0].server == "beta"
    pool.client.release(fifth.id)
    for lease, held in [(there, line), *leases]:
        assert state(pool, lease) is LeaseState.ACTIVE and held.alive, "they outlived the pool"
        held.release()


def test_a_node_dies_and_another_joins(pool: Pool, farm: Farm, eventually: Callable) -> None:
    doomed, line = pool.hold(ask(0.5, 2, filters={"server": "gamma"}))
    other, other_line = pool.hold(ask(0.5, filters={"server": "alpha"}))
    spread, spread_line = pool.hold(ask(0.3, 6, spread=True))
    assert spread.worker is not None
    farm.kill("gamma")
    both = doomed.id, spread.id
    eventually(
        lambda: all(pool.client.lease(one).state.ended for one in both), "its leases end", LOST_WITHIN_S
    )
    lost, whole = map(pool.client.lease, both)
    assert lost.state is whole.state is LeaseState.LOST and "gamma" in lost.reason
    assert whole.reason == f"{lost.reason}; what the lease had on alpha, beta ended with it"
    eventually(lambda: line.lost and spread_line.lost, "their holders hear of it")
    with pytest.raises(LeaseEnded, match="gamma"):
        pool.client.heartbeat(spread.id)
    eventually(
        lambda: not any(runs(spread.worker.on(name).pid) for name in NAMES),
        "all its workers end",
    )
    assert pool.servers() == ["alpha", "beta"]
    assert state(pool, other) is LeaseState.ACTIVE and other_line.alive
    other_line.release()
    farm.join("delta")
    eventually(lambda: "delta" in pool.servers(), "the new node is there")
    _, line = pool.hold(ask(1.0, 2, filters={"server": "delta"}))
    line.release()


def test_the_pool_is_killed(pool: Pool, eventually: Callable) -> None:
    held = [pool.hold(ask(0.3)) for _ in range(3)] + [pool.hold(ask(0.2, 5, spread=True))]
    before = shares()
    pool.kill()
    held[0][1].release()  # while nobody looks
    pool.start()
    eventually(lambda: state(pool, held[0][0]).ended, "how it ended meanwhile is known")
    assert state(pool, held[0][0]) is LeaseState.RELEASED
    for lease, line in held[1:]:
        now = pool.client.lease(lease.id)
        assert (now.state, now.worker) == (LeaseState.ACTIVE, lease.worker) and line.alive
        assert shares()[lease.id] == before[lease.id]
        line.release()


def test_the_network_to_a_node_is_cut_and_healed(pool: Pool, farm: Farm, eventually: Callable) -> None:
    """Every process of the node stands still, so that nothing is heard of it and nothing heard there."""
    cut, line = pool.hold(ask(1.0, 2, filters={"server": "beta"}))
    other, other_line = pool.hold(ask(1.0, filters={"server": "alpha"}))
    assert cut.worker is not None
    frozen = farm.freeze("beta")
    try:
        lost = eventually(
            lambda: state(pool, cut).ended and pool.client.lease(cut.id), "its lease ends", LOST_WITHIN_S
        )
        assert lost.state is LeaseState.LOST and "nothing was heard of GPU server beta" in lost.reason
        assert "beta" not in pool.servers()
        waiting = pool.client.request(ask(1.0, 2))
        assert {piece.server for piece in waiting.slices}.isdisjoint({"beta"})
        pool.client.release(waiting.id)
        assert state(pool, other) is LeaseState.ACTIVE and other_line.alive
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    eventually(lambda: "beta" in pool.servers(), "it is there again")
    assert not runs(cut.worker.pid), "first of all the worker of the lost lease is ended"
    eventually(lambda: line.lost, "its holder hears of it")
    _, again = pool.hold(ask(1.0, 2, filters={"server": "beta"}))
    again.release()
    other_line.release()


@pytest.mark.soak
def test_leases_of_mixed_size_come_and_go(pool: Pool, farm: Farm, eventually: Callable) -> None:
    leases, clients = often(16, 200), 4
    answers: list[str] = []

    def one(rnd: random.Random) -> str:
        count = rnd.choice([1, 1, 1, 2, 3, 4])
        request = ask(rnd.choice([0.05, 0.1, 0.25, 0.5, 0.8, 1.0]), count, spread=count > 2)
        try:
            lease = pool.client.request(request, wait_s=1)
            deadline = time.monotonic() + 300
            while lease.state in (LeaseState.QUEUED, LeaseState.GRANTED) and time.monotonic() < deadline:
                pool.client.heartbeat(lease.id)
                lease = pool.client.wait(lease.id, lease, 1)
            if lease.state is not LeaseState.ACTIVE:
                return f"{lease.state.value}: {lease.reason}"
            line = Lifeline(spec_of(lease))
            if rnd.random() < 0.5:
                line.release()
            pool.client.release(lease.id)
            line.release()
            return "done"
        except PoolError as e:
            return f"{type(e).__name__}: {e}"

    def client(number: int) -> None:
        rnd = random.Random(number)
        for _ in range(leases // clients):
            answers.append(one(rnd))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]

    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            gpus = pool.gpus()
            assert all(gpu["granted_mib"] <= gpu["memory_mib"] for gpu in gpus)
            time.sleep(0.2)
    finally:
        for thread in threads:
            thread.join()
    assert len(answers) == leases
    assert [answer for answer in answers if answer != "done"] == []
