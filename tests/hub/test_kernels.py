"""The other mode: what was chosen is what each kernel of a server is given, and the most that they have together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.client import requests
from jupyter_gpupool.core.errors import ImpossibleRequest, NoCapacity, PermissionDenied

from .running import Hub

Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub]) -> Hub:
    made = new_hub(mode="kernel")
    made.start()
    return made


def test_kernels_have_what_was_chosen_and_no_more(hub: Hub, eventually: Eventually) -> None:
    assert hub.spawn("alice", num_gpus=2, partial=0.5).status_code in (201, 202)
    eventually(lambda: hub.ready("alice"), "alice's server runs")
    assert hub.leases() == {}, "nothing is lent before a kernel wants it"
    with hub.of("alice") as server:
        kernel = server.post("api/kernels", json={"name": "python3"}).json()
        eventually(lambda: hub.leases() == {"alice": "ACTIVE"}, "its kernel's lease")
        (lease,) = hub.pool().leases()
        assert [piece.memory_mib for piece in lease.slices] == [16255, 16255]
        assert "gpupool/api/v1" in str(server.get("gpupool/api/v1/pool").url)
        assert [found["id"] for found in server.get("gpupool/api/v1/leases").json()["leases"]] == [lease.id]

        hers = hub.pool(hub.token_of("alice"))
        with pytest.raises(NoCapacity, match="2 GPUs of the 2 that were chosen"):
            hers.request(asked(num_gpus=1, partial=0.1))
        for more in ({"num_gpus": 3}, {"num_gpus": 1, "partial": 0.6}, {"num_gpus": 1, "memory_mib": 30000}):
            with pytest.raises(ImpossibleRequest, match="was chosen for this server"):
                hers.request(asked(**more))
        # Another server's mark, written by hand, is not believed.
        forged = json.loads(json.dumps("mine hub-server:0123456789abcdef0123"))
        with pytest.raises(NoCapacity):
            hers.request(holder_request(forged))

        assert server.delete(f"api/kernels/{kernel['id']}").status_code == 204
        eventually(lambda: hub.leases() == {}, "the kernel's is given back")
        server.post("api/kernels", json={"name": "python3"})
        eventually(lambda: hub.leases() == {"alice": "ACTIVE"}, "another kernel's lease")
    hub.process_of("alice").kill()
    eventually(lambda: hub.leases() == {}, "with the server its kernels' go back")


def test_without_a_server_there_is_nothing(hub: Hub) -> None:
    hub.http.post("/users/bob")
    made = hub.http.post("/users/bob/tokens", json={"scopes": ["custom:gpupool:use"]})
    bobs = hub.pool(made.json()["token"])
    assert bobs.leases() == []
    with pytest.raises(PermissionDenied, match="start one"):
        bobs.request(asked(num_gpus=1, partial=0.1))


def asked(**fields: Any) -> Any:
    return requests.new_request(**fields)[0]


def holder_request(client: str) -> Any:
    from dataclasses import replace

    return replace(asked(num_gpus=1, partial=0.1), client=client)
