"""kill -9 of the pool amid grants, many times over the same ledger."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.gpus import emulated_gpus
from jupyter_gpupool.pool.ledger.ledger import Ledger

from ...conftest import often

RESTARTS = often(6, 50)
#: How many grants there are to lose at least; a busy machine takes more restarts for them.
GRANTS = often(10, 100)
MEMORY = {gpu.uuid: gpu.memory_mib for gpu in emulated_gpus("one")}
POOL = Path(__file__).with_name("grant_until_killed.py")


def run_and_kill(db_url: str, lines: int) -> list[dict[str, Any]]:
    """Start the pool, kill it while it works on after that many lines, and return all that it told."""
    pool = subprocess.Popen([sys.executable, str(POOL), db_url], stdout=subprocess.PIPE, text=True)
    assert pool.stdout is not None
    try:
        told = [pool.stdout.readline() for _ in range(lines)]
    finally:
        pool.kill()
    rest = pool.stdout.read()
    assert pool.wait() == -9, "it ended by itself"
    pool.stdout.close()
    told += rest.splitlines(keepends=True)
    return [json.loads(line) for line in told if line.endswith("\n")]


@pytest.mark.soak
def test_kills_never_grant_twice_and_never_lose(db_url: str) -> None:
    dice = random.Random(50)
    ended: dict[str, str] = {}
    slices: dict[str, list[list[Any]]] = {}
    asked: set[str] = set()
    promised: set[str] = set()
    restarts = 0
    while restarts < RESTARTS or len(slices) < GRANTS:
        restarts += 1
        assert restarts <= 20 * RESTARTS, f"only {len(slices)} grants in {restarts} restarts"
        for line in run_and_kill(db_url, dice.randint(1, 40)):
            if "asking" in line:
                asked.add(line["asking"])
            if "leased" in line:
                promised.add(line["leased"])
                if line["slices"]:
                    slices[line["leased"]] = line["slices"]
            if "ended" in line:
                ended[line["ended"]] = line["state"]

        ledger = Ledger(db_url)
        with ledger.reading() as tx:
            leases = {lease.id: lease for lease in tx.leases(tuple(LeaseState))}
            counted = tx.granted_mib()
        ledger.close()

        assert promised <= set(leases) <= asked, "what was promised is kept, and nothing else is there"
        held = dict.fromkeys(MEMORY, 0)
        for lease in leases.values():
            assert bool(lease.slices) == (lease.granted_at is not None), "a grant is whole or not there"
            if lease.slices:
                assert len(lease.slices) == lease.request.num_gpus
            if lease.state.holds:
                for piece in lease.slices:
                    held[piece.gpu_uuid] += piece.memory_mib
            if lease.id in slices:
                told = sorted(map(tuple, slices[lease.id]))
                assert sorted((piece.gpu_uuid, piece.memory_mib) for piece in lease.slices) == told
            if lease.id in ended:
                assert lease.state.value == ended[lease.id], "what was told to have ended has"
        assert counted == held, "not one MiB is lost or held by nobody"
        assert all(held[gpu] <= memory for gpu, memory in MEMORY.items()), "never granted twice"
