"""The utilisation that a running pool tells over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core import errors

from .conftest import Pool, ask


def test_a_grant_is_seen_in_the_history_of_the_pool_and_its_gpus(
    pool: Pool, eventually: Callable[..., Any]
) -> None:
    lease, line = pool.hold(ask(0.8, 2))
    since = time.time() - 60

    def seen() -> Any:
        said = pool.client.history(since, gpus=None)
        return said if 52016 in said["granted_mib"] else None

    said = eventually(seen, "the grant is in the history")
    assert set(said["memory_mib"]) == {None, 65020}  # gaps from before the pool ran
    uuids = {s.gpu_uuid for s in lease.slices}
    assert set(said["gpus"]) == uuids
    assert all(26008 in said["gpus"][uuid]["granted_mib"] for uuid in uuids)
    assert list(pool.client.history(since, gpus=[min(uuids)])["gpus"]) == [min(uuids)]
    line.release()


@pytest.mark.parametrize("query", [{"since": "yesterday"}, {"since": "nan"}, {"step": "0"}, {"step": "1e30"}])
def test_nonsense_is_refused_in_one_line(pool: Pool, query: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidRequest):
        pool.client._call("GET", "/history", query)
