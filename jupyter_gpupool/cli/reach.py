"""What only the one who asks can see of a pool: its clock, the way to its servers, this machine's own network."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..devices.checks import Check, graded
from ..devices.diagnosis import BANDWIDTH_GBIT, LEAST_MTU, ROUND_TRIP_US
from ..devices.host import interface_of, local_address

#: How often a figure of time is taken; the best one, or their median, is told.
_CLOCKS, _CONNECTIONS = 5, 21
_PATIENCE_S = 2.0


def checks(ask: Callable[[], Mapping[str, Any]], url: str, pool: Mapping[str, Any]) -> Iterator[Check]:
    """Of a pool at ``url``; ``ask`` is ``GET health``, ``pool`` is the answer of ``GET pool``."""
    yield clock_check(*_clock(ask))
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    where = {"control": parts.hostname or "", **{s["name"]: s["host"] for s in pool["servers"]}}
    for server, host in where.items():
        yield round_trip_check(server, connect(host, port))
    yield from _own_network(parts.hostname or "", port)


def clock_check(ahead_s: float, uncertain_s: float) -> Check:
    """The pool's clock is ``ahead_s`` ahead of this machine's, give or take ``uncertain_s``."""
    sure = max(0.0, abs(ahead_s) - uncertain_s)
    return graded(
        "clock",
        round(sure, 3),
        "s",
        at_most=5.0,
        fails_beyond=300.0,
        detail=f"the pool's clock is {abs(ahead_s):.3f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's, "
        f"give or take {uncertain_s:.3f} s",
        advice="let chrony or systemd-timesyncd set both clocks: certificates and tokens are valid by them",
        server="control",
    )


def round_trip_check(
    server: str, seconds: float | None, of: str = "to connect", name: str = "round trip"
) -> Check:
    micro = None if seconds is None else round(seconds * 1e6, 1)
    return graded(
        name,
        micro,
        "µs",
        at_most=ROUND_TRIP_US,
        fails_beyond=1e6,
        detail=f"{micro} µs: {of}",
        advice=f"{ROUND_TRIP_US:g} µs are recommended: put clients and GPU servers on one switch; only what a program "
        "looks at waits for a round trip",
        unknown="no answer to a connection from here; a firewall may be in the way",
        server=server,
    )


def bandwidth_check(server: str, gbit: float | None, which: str) -> Check:
    return graded(
        f"bandwidth {which}",
        None if gbit is None else round(gbit, 2),
        "Gbit/s",
        at_least=BANDWIDTH_GBIT,
        detail=f"{gbit or 0:.1f} Gbit/s",
        advice=f"{BANDWIDTH_GBIT:g} Gbit/s are recommended between clients and GPU servers",
        unknown="not measured: it takes a small lease; `gpupool netperf` does",
        server=server,
    )


def _clock(ask: Callable[[], Mapping[str, Any]]) -> tuple[float, float]:
    """How far the pool's clock is ahead, and how uncertain that is: of the quickest of some questions."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCKS):
        wall, began = time.time(), time.perf_counter()
        theirs = float(ask()["time"])
        half = (time.perf_counter() - began) / 2
        if half < best[1]:
            best = (theirs - (wall + half), half)
    return best


def connect(host: str, port: int) -> float | None:
    """How long a connection takes, in seconds: one round trip. A port that is closed answers as quickly."""
    taken = []
    for _ in range(_CONNECTIONS):
        began = time.perf_counter()
        try:
            with socket.create_connection((host, port), _PATIENCE_S):
                taken.append(time.perf_counter() - began)
        except ConnectionRefusedError:
            taken.append(time.perf_counter() - began)
        except (OSError, UnicodeError):
            break
    return statistics.median(taken) if taken else None


def _own_network(host: str, port: int) -> Iterator[Check]:
    name, mtu, mbit = interface_of(local_address(host, port) or "-")
    yield graded(
        "mtu",
        mtu,
        "bytes",
        at_least=LEAST_MTU,
        detail=f"{name} has {mtu}",
        advice="look for a tunnel in the way; clients and servers do best with 9000 bytes throughout",
        unknown="the network interface towards the pool is not known",
        server="this machine",
    )
    yield graded(
        "link",
        None if mbit is None else mbit / 1000,
        "Gbit/s",
        at_least=BANDWIDTH_GBIT,
        detail=f"{name} has {(mbit or 0) / 1000:g} Gbit/s",
        advice=f"{BANDWIDTH_GBIT:g} Gbit/s are recommended between clients and GPU servers",
        unknown="the network interface does not tell its speed",
        server="this machine",
    )
