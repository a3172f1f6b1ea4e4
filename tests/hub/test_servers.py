"""Servers with slices of the pool: what is lent at a start, and given back however the server ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .running import Hub


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub]) -> Iterator[Hub]:
    made = new_hub()
    made.start()
    yield made


def test_a_server_holds_what_was_chosen_until_it_is_stopped(hub: Hub, eventually: Callable[..., Any]) -> None:
    assert hub.spawn("alice", num_gpus=2, partial=0.5).status_code in (201, 202)
    eventually(lambda: hub.ready("alice"), "alice's server runs")
    (lease,) = hub.pool().leases()
    assert (lease.request.owner, lease.state.value) == ("alice", "ACTIVE")
    assert lease.request.namespace == "vision", "after her group at the hub"
    assert [piece.memory_mib for piece in lease.slices] == [16255, 16255]
    hub.stop_server("alice")
    eventually(lambda: not hub.pool().leases(), "it was given back")
