"""What a lost connection costs a program, and what it costs to be ready for one."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jupyter_gpupool.pytorch.client.dispatch import attachment
from jupyter_gpupool.transport import frames, tls

from .far_worker import certificate, far_worker

#: From the reset to the answer of the call that meets it, above what the same call takes otherwise; and the cost of an
#: asynchronous operator with what makes a session resumable, compared to one without.
GOALS = {"reset_ms": ("<=", 50.0), "reset_tls_ms": ("<=", 50.0), "undisturbed_ratio": ("<=", 1.01)}

OPERATORS = 4_000
PAIRS = 41
RESETS = 30


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures: dict[str, Any] = {}
        with far_worker(linked=False):
            figures["reset_ms"] = _reset_ms()
            figures.update(_undisturbed())
        with certificate() as secured, far_worker(linked=False, secured=secured):
            figures["reset_tls_ms"] = _reset_ms()
        return figures
    finally:
        torch.set_num_threads(threads)


def _reset_ms() -> float:
    """Return the median ms that a call takes longer because its connection was just lost."""
    x = torch.ones(4, device="cuda")
    connection = attachment.stream(0).connection
    longer = []
    for _ in range(RESETS):
        began = time.perf_counter()
        x.sum().item()
        usual = time.perf_counter() - began
        sock = connection._sock
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)
        began = time.perf_counter()
        x.sum().item()
        longer.append(time.perf_counter() - began - usual)
    assert connection.reconnects == RESETS
    return round(1e3 * statistics.median(longer), 2)


def _undisturbed() -> dict[str, float]:
    """Compare pairs of rounds, one of each with the frames sent as before sessions could be resumed."""
    x = torch.ones(4, 4, device="cuda")
    ratios, usual = [], []
    for number in range(PAIRS + 1):
        if number % 2:
            ready = _us(lambda: x + x)
            with _unprepared():
                bare = _us(lambda: x + x)
        else:
            with _unprepared():
                bare = _us(lambda: x + x)
            ready = _us(lambda: x + x)
        if number:
            ratios.append(ready / bare)
            usual.append(ready)
    return {
        "undisturbed_ratio": round(statistics.median(ratios), 4),
        "async_us": round(statistics.median(usual), 2),
    }


def _us(operator: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(OPERATORS):
        operator()
    return (time.perf_counter() - began) / OPERATORS * 1e6


@contextmanager
def _unprepared() -> Iterator[None]:
    """Send and listen as if no connection could be lost: what is sent is counted, but not kept."""
    stream = attachment.stream(0)
    connection = stream.connection

    def send_gathered(question: tuple[Any, ...] = ()) -> int:
        sock, end, buffer = connection._sock, connection.end, stream.buffer
        assert sock is not None
        n = len(buffer)
        records = buffer[:n]
        del buffer[:n]
        end._acknowledged = connection._transmitted = number = end._acknowledged + 1
        frames.send(sock, frames.Kind.RECORDS, [*records, *question] if question else records)
        return number

    def listen() -> None:
        assert connection._sock is not None
        while tls.readable(connection._sock, connection._poll, 0):
            connection._take(0, None)

    stream.wait()
    stream._send_gathered = send_gathered  # type: ignore[method-assign]
    connection.listen = listen  # type: ignore[method-assign]
    try:
        yield
        stream.wait()
    finally:
        del stream._send_gathered, connection.listen  # type: ignore[method-assign]
