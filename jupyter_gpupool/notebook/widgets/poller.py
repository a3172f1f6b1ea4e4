"""Reads the pool once a second for all widgets of this kernel, and not at all while there are none."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

from jupyter_gpupool.client import pool_finder
from jupyter_gpupool.client.http import PoolClient
from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.notebook import kernel_lease

POLL_INTERVAL_S = 1.0


@dataclass(frozen=True)
class News:
    """The pool's state (as ``GET pool`` returns it) and this kernel's lease, or in ``trouble`` why there is none."""

    time: float
    pool: dict[str, Any] | None = None
    lease: Lease | None = None
    trouble: str = ""


class Watcher(Protocol):
    """A widget that shows the pool."""

    def update_pool(self, news: News) -> None:
        """Show the pool's new state. Called from the poller's thread."""


_lock = threading.Lock()
_watchers: WeakSet[Any] = WeakSet()
_wake = threading.Event()
_thread: threading.Thread | None = None


def watch(watcher: Watcher) -> None:
    """Call ``watcher.update_pool`` about once a second until :func:`forget`, or until it is collected."""
    global _thread
    with _lock:
        _watchers.add(watcher)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="gpupool-watch", daemon=True)
            _thread.start()
    _wake.set()


def forget(watcher: Watcher) -> None:
    """Stop calling the watcher."""
    with _lock:
        _watchers.discard(watcher)
    _wake.set()


def look_now() -> None:
    """Read the pool now, because something has changed."""
    _wake.set()


def running() -> bool:
    """Return whether the poller's thread runs."""
    return _thread is not None


def _run() -> None:
    global _thread
    client: PoolClient | None = None
    while True:
        _wake.clear()
        with _lock:
            if not _watchers:
                _thread = None
                break
        client, news = _look(client)
        for watcher in list(_watchers):
            try:
                watcher.update_pool(news)
            except Exception:  # one widget's failure must not affect the others
                logging.getLogger(__name__).exception("A widget failed, and is not updated any more")
                forget(watcher)
        watcher = None  # do not keep the widget alive until the next read
        _wake.wait(POLL_INTERVAL_S)
    if client is not None:
        client.close()


def _look(client: PoolClient | None) -> tuple[PoolClient | None, News]:
    try:
        if client is None:
            running = pool_finder.running_pool()
            if running is None:
                return None, News(time.time(), trouble="no GPU pool is running yet; a request starts one")
            client, _ = running
        lease = kernel_lease.known(client)
        if lease is not None and lease.state.ended:
            lease = None
        return client, News(time.time(), client.pool(), lease)
    except PoolError as e:
        if client is not None:
            client.close()
        return None, News(time.time(), trouble=str(e))
