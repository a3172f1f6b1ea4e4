"""A pool's service that the hub does not start, as on a farm: over HTTPS, with a certificate of the farm's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_gpupool.client import requests
from jupyter_gpupool.core.errors import PoolUnreachable
from jupyter_gpupool.server.daemon import certificates
from jupyter_gpupool.transport.frames import WireError
from jupyter_gpupool.transport.handshake import Refused
from jupyter_gpupool.transport.lifeline import Lifeline

from .running import TOKEN, Hub

Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("farm")
    ours = certificates.new_authority("farm")
    server = certificates.new_server(ours, ["127.0.0.1"])
    for name, content in (
        ("ca.crt", ours.certificate),
        ("server.crt", server.certificate),
        ("server.key", server.key),
    ):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def hub(new_hub: Callable[..., Hub], farm: Path) -> Iterator[Hub]:
    made = new_hub(
        f"c.Spawner.environment = {{'LIGHT_TAKES': '1'}}\n"
        f"c.ConfigurableHTTPProxy.command.append('--client-ssl-ca={farm / 'ca.crt'}')",
        light=True,
        managed=False,
        api_token=TOKEN[::-1],
        ca_file=str(farm / "ca.crt"),
        secure=True,
    )
    service = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "jupyter_gpupool.hub.service.app", "--unmanaged", "--emulate"),
            f"--GPUPoolHubService.directory={farm / 'state'}",
            f"--GPUPoolHubService.certfile={farm / 'server.crt'}",
            f"--GPUPoolHubService.keyfile={farm / 'server.key'}",
        ],
        env={**os.environ, **made.service_environment()},
        stdin=subprocess.DEVNULL,
    )
    try:
        made.start()
        yield made
    finally:
        made.stop()
        service.send_signal(signal.SIGTERM)
        service.wait(300)


def test_a_server_holds_its_lease_by_tls(hub: Hub, farm: Path, eventually: Eventually) -> None:
    assert hub.spawn("alice", num_gpus=2, partial=0.5).status_code in (201, 202)
    eventually(lambda: hub.ready("alice"), "alice's server runs")
    (lease,) = hub.pool().leases()
    assert lease.worker is not None
    assert lease.state.value == "ACTIVE"
    mine = hub.pool(hub.token_of("alice"))
    eventually(lambda: mine.my_server()[1] == "", "her server holds it")
    # It does so at the one port of all workers, where nobody is heard without TLS, or with another lease's secret.
    connections = hub.process_of("alice").net_connections("tcp")
    assert lease.worker.port in [c.raddr.port for c in connections if c.status == psutil.CONN_ESTABLISHED]
    spec = requests.attach_spec(mine, lease, "guessed", "remote")
    assert spec.secure
    for wrong in (spec, replace(spec, secure=False)):
        with pytest.raises((Refused, WireError, OSError)):
            Lifeline(wrong)
    # Whoever does not know the farm's authority does not get as far as showing a token.
    with pytest.raises(PoolUnreachable, match="certificate"):
        hub.pool(
            hub.token_of("alice"), ca=certificates.new_authority("another").certificate.decode()
        ).leases()
    hub.process_of("alice").kill()
    eventually(lambda: not hub.leases(), "it was given back")
