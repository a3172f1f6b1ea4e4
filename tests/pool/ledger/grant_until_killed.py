"""A pool in a process of its own, for test_crashes.py to kill: grants, starts and releases without end.

Usage: grant_until_killed.py URL, of a ledger. It writes what
the pool told it, one JSON object a line, as a client would have heard it: after the call returned.
"""

from __future__ import annotations

import json
import os
import random
import sys
import uuid

from jupyter_gpupool.core.models import Lease, LeaseState, Request, Server, WorkerAddress
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.file_lock import LedgerLock
from jupyter_gpupool.pool.ledger.ledger import Ledger
from jupyter_gpupool.pool.manager import Manager


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main(url: str) -> None:
    ledger = Ledger(url)
    if ledger.path is not None:
        lock = LedgerLock(ledger.path)
        lock.acquire()
    manager = Manager(ledger, ttl_s=3600.0)
    manager.set_servers([Server("one", "127.0.0.1", emulated_gpus("one"))])
    # Every second worker survived, as it were; a real one would be found by its process id.
    adopted = {
        lease.id: lease.worker or WorkerAddress("127.0.0.1", 1, os.getpid(), 0.0)
        for number, lease in enumerate(manager.leases())
        if number % 2 and lease.state.holds
    }
    manager.recover(adopted)
    tell(recovered=sorted(adopted))

    dice = random.Random()
    while True:
        live = manager.leases()
        if len(live) > 8 or (live and dice.random() < 0.4):
            ended = manager.release(dice.choice(live).id).lease
            assert ended is not None
            tell(ended=ended.id, state=ended.state.value)
            continue
        if live and dice.random() < 0.4:
            chosen = dice.choice(live)
            if chosen.state is LeaseState.GRANTED:
                manager.worker_started(chosen.id, WorkerAddress("127.0.0.1", 1, os.getpid(), 0.0))
                tell(active=chosen.id)
            continue
        request = Request(
            id=str(uuid.uuid4()),
            owner="ada",
            num_gpus=dice.choice([1, 1, 2]),
            partial=dice.choice([0.3, 0.5, 0.8]),
            secret_sha256="0" * 64,
        )
        tell(asking=request.id)
        lease: Lease | None = manager.request(request).lease
        assert lease is not None
        tell(
            leased=lease.id,
            state=lease.state.value,
            slices=[[s.gpu_uuid, s.memory_mib] for s in lease.slices],
        )


if __name__ == "__main__":
    main(sys.argv[1])
