"""Health checks from the client's side: the pool's clock, the network to its servers, this machine's interface."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from jupyter_gpupool.core.checks import Check, graded
from jupyter_gpupool.gpus.health.diagnosis import BANDWIDTH_GBIT, MIN_MTU, ROUND_TRIP_US
from jupyter_gpupool.gpus.health.host_reader import interface_of, local_address

#: Samples of the clock's offset, of which the best counts, and of a connection's time, of which the median counts.
_CLOCK_SAMPLES, _CONNECTION_SAMPLES = 5, 21
_CONNECT_TIMEOUT_S = 2.0


def checks(ask: Callable[[], Mapping[str, Any]], url: str, pool: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the checks of the pool at ``url``. ``ask``: calls ``GET health``; ``pool``: the answer of ``GET pool``."""
    yield clock_check(*_clock(ask))
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    where = {"control": parts.hostname or "", **{s["name"]: s["host"] for s in pool["servers"]}}
    for server, host in where.items():
        yield round_trip_check(server, connect(host, port))
    yield from _own_network(parts.hostname or "", port)


def clock_check(ahead_s: float, uncertain_s: float) -> Check:
    """Return the check of a clock that is ``ahead_s`` ahead of this machine's, give or take ``uncertain_s``."""
    sure = max(0.0, abs(ahead_s) - uncertain_s)
    return graded(
        "clock",
        round(sure, 3),
        "s",
        at_most=5.0,
        fails_beyond=300.0,
        detail=f"the pool's clock is {abs(ahead_s):.3f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's, "
        f"give or take {uncertain_s:.3f} s",
        advice="synchronize both clocks, for example with chrony: certificates and tokens expire by them",
        server="control",
    )


def round_trip_check(
    server: str, seconds: float | None, of: str = "to connect", name: str = "round trip"
) -> Check:
    """Return the check of a round trip of so many seconds; None where there was no answer."""
    micro = None if seconds is None else round(seconds * 1e6, 1)
    return graded(
        name,
        micro,
        "µs",
        at_most=ROUND_TRIP_US,
        fails_beyond=1e6,
        detail=f"{micro} µs: {of}",
        advice=f"at most {ROUND_TRIP_US:g} µs are recommended: connect clients and GPU servers to the same switch; a "
        "program waits for a round trip whenever it reads a value",
        unknown="no answer to a connection from this machine; check firewalls in between",
        server=server,
    )


def bandwidth_check(server: str, gbit: float | None, which: str) -> Check:
    """Return the check of a bandwidth of ``gbit`` Gbit/s; None where it was not measured."""
    return graded(
        f"bandwidth {which}",
        None if gbit is None else round(gbit, 2),
        "Gbit/s",
        at_least=BANDWIDTH_GBIT,
        detail=f"{gbit or 0:.1f} Gbit/s",
        advice=f"{BANDWIDTH_GBIT:g} Gbit/s are recommended between clients and GPU servers",
        unknown="not measured, because that needs a lease; run `gpupool netperf`",
        server=server,
    )


def _clock(ask: Callable[[], Mapping[str, Any]]) -> tuple[float, float]:
    """Return how far the pool's clock is ahead, and the uncertainty, in seconds, from the fastest of some calls."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_SAMPLES):
        wall, began = time.time(), time.perf_counter()
        theirs = float(ask()["time"])
        half = (time.perf_counter() - began) / 2
        if half < best[1]:
            best = (theirs - (wall + half), half)
    return best


def connect(host: str, port: int) -> float | None:
    """Return the median time to connect in seconds, which is one round trip; None without an answer.

    A closed port answers as quickly as an open one.
    """
    taken = []
    for _ in range(_CONNECTION_SAMPLES):
        began = time.perf_counter()
        try:
            with socket.create_connection((host, port), _CONNECT_TIMEOUT_S):
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
        at_least=MIN_MTU,
        detail=f"{name} has {mtu}",
        advice="look for a tunnel on the path; an MTU of 9000 bytes between clients and servers works best",
        unknown="the network interface towards the pool could not be determined",
        server="this machine",
    )
    yield graded(
        "link",
        None if mbit is None else mbit / 1000,
        "Gbit/s",
        at_least=BANDWIDTH_GBIT,
        detail=f"{name} has {(mbit or 0) / 1000:g} Gbit/s",
        advice=f"{BANDWIDTH_GBIT:g} Gbit/s are recommended between clients and GPU servers",
        unknown="the network interface does not report its speed",
        server="this machine",
    )
