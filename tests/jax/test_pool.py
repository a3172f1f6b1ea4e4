"""JAX programs with a lease of a real pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jupyter_gpupool.cli import smi
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.notebook import tables

from ..support.user_pool import UserPool


@pytest.fixture
def pool(jupyter_home: Any, user_pool: UserPool) -> Iterator[PoolClient]:
    """A pool that this user runs already; every process of the test finds it. Without leases before and after."""
    with user_pool.publish() as client:
        yield client
    user_pool.end_leases()


ATTACHED = """
import jupyter_gpupool, jax, jax.numpy as jnp, sys
with jupyter_gpupool.attach(partial=0.5) as lease:
    x = jnp.arange(4.0)
    print(x.devices(), (x @ x).tolist(), "emulated" in jax.devices()[0].device_kind)
    lease.resize(0.25)
    print("torch" in sys.modules)
    import torch
    print(torch.ones(2, device="cuda").sum().item(), torch.cuda.get_device_properties(0).total_memory >> 20)
try:
    (x + 1).tolist()
except jax.errors.JaxRuntimeError as e:
    print(e)
"""


def test_a_lease_is_all_that_jax_needs(run_program: Callable[..., Any], pool: PoolClient) -> None:
    done = run_program(ATTACHED, None)
    assert done.returncode == 0, done.stderr
    first, imported, by_torch, last = done.stdout.splitlines()
    assert first == "{CudaDevice(id=0)} 14.0 True"
    assert imported == "False", "a program that uses JAX alone need not import PyTorch"
    assert by_torch == "2.0 8127"
    assert last.startswith("UNAVAILABLE: the session with the worker") and "released" in last


WATCHED = """
import sys, jupyter_gpupool, jax.numpy as jnp
with jupyter_gpupool.attach(partial=0.5):
    x = jnp.ones(4 << 20).block_until_ready()
    print("here", flush=True)
    sys.stdin.readline()
"""


def test_others_see_what_a_lease_that_runs_jax_uses(
    prepare_program: Callable[..., Any], pool: PoolClient, eventually: Callable[..., Any]
) -> None:
    def seen() -> list[Any]:
        gpus = [gpu for server in pool.pool()["servers"] for gpu in server["gpus"]]
        return [(piece["used_mib"], piece["frameworks"]) for gpu in gpus for piece in gpu["slices"]]

    program = prepare_program(WATCHED, None).start()
    with program:
        assert program.stdout.readline() == "here\n"
        eventually(lambda: seen() == [(16, ["jax"])], "the worker reports it")
        assert any("(jax)" in line for line in smi.picture(pool.pool(), "here", "now"))
        (lease,) = pool.leases()
        assert "used by jax" in tables.of_lease(lease, {}, ["jax"]).heading
        program.stdin.write("\n")
