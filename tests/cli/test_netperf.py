"""`gpupool netperf`: real leases, real copies, and nothing left behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.pytorch.client.netperf import quantile

pytest.importorskip("torch", reason="workers need PyTorch")

QUICK = ("--seconds", 0.1, "--size", 4)


def test_each_server_is_measured(gpupool: Callable[..., Any], pool: Any) -> None:
    done = gpupool("netperf", *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["recommended"] == {"round_trip_us": 50.0, "bandwidth_gbit_s": 10.0} and said["tls"] is False
    (server,) = said["servers"]
    trips = server["round_trip_us"]
    assert 0 < trips["p50"] <= trips["p99"] and trips["samples"] >= 3 and server["connect_us"] > 0
    assert server["to_device_gbit_s"] > 0 and server["from_device_gbit_s"] > 0
    assert server["copied_bytes"] == 4 << 20 and server["emulated"] is True and not server["error"]
    assert [(c["name"], c["threshold"]) for c in server["checks"]] == [
        ("round trip", 50.0),
        ("round trip 99 %", 50.0),
        ("bandwidth to the device", 10.0),
        ("bandwidth from the device", 10.0),
    ]
    assert pool.idle() and pool.granted() == [0, 0]
    (ended,) = [lease for lease in pool.client.leases(include_ended=True) if lease.request.label == "netperf"]
    assert ended.state is LeaseState.RELEASED and ended.slices[0].memory_mib == 4 + 64


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_its_lease_is_given_back(
    sig: signal.Signals, start: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    running = start("netperf", "--seconds", 60)
    eventually(
        lambda: [lease for lease in pool.client.leases() if lease.state is LeaseState.ACTIVE],
        "it measures",
    )
    running.process.send_signal(sig)
    code = running.wait()
    assert code == (-sig if sig is signal.SIGKILL else 128 + sig)
    assert "Traceback" not in running.log
    eventually(pool.idle, "its lease has ended")


def test_a_server_without_room_is_not_waited_for(
    gpupool: Callable[..., Any], start: Callable[..., Any], eventually: Callable[..., Any], pool: Any
) -> None:
    holding = start("run", "-n", 2, "--", "sh", "-c", "echo runs; read x")
    eventually(lambda: "runs" in holding.out, "somebody else has all of it")
    done = gpupool("netperf", *QUICK)
    assert done.returncode == 1 and "not measured: " in done.stdout and "Traceback" not in done.stderr
    holding.close_stdin()


def test_what_cannot_be_asked(gpupool: Callable[..., Any], pool: Any, last_line: Any) -> None:
    for words, line in (
        (("--server", "nowhere"), "the pool has no server 'nowhere'"),
        (("--seconds", 0), "seconds above 0"),
        (("--size", "big"), "MiB"),
    ):
        done = gpupool("netperf", *words)
        assert done.returncode == 2 and line in last_line(done)


def test_quantiles() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0, 0.5, 0.51, 0.99, 1)] == [1, 2, 3, 4, 4]
    assert quantile([5.0], 0.99) == 5.0
