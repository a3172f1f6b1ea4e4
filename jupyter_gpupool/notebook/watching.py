"""One look at the pool a second for everything in this kernel that shows it, and none when nothing does."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

from .. import holder
from ..pool.errors import PoolError
from ..pool.models import Lease
from . import here

EVERY_S = 1.0


@dataclass(frozen=True)
class News:
    """What one look found: the pool as ``GET pool`` has it (None: there is none), this kernel's lease, or why not."""

    time: float
    pool: dict[str, Any] | None = None
    lease: Lease | None = None
    trouble: str = ""


class Watcher(Protocol):
    def hear(self, news: News) -> None:
        """Called from a thread of its own."""


_lock = threading.Lock()
_watchers: WeakSet[Any] = WeakSet()
_wake = threading.Event()
_thread: threading.Thread | None = None


def watch(watcher: Watcher) -> None:
    """Have ``watcher.hear`` called from now on, about once a second, until :func:`forget` or its end."""
    global _thread
    with _lock:
        _watchers.add(watcher)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="gpupool-watch", daemon=True)
            _thread.start()
    _wake.set()


def forget(watcher: Watcher) -> None:
    with _lock:
        _watchers.discard(watcher)
    _wake.set()


def look_now() -> None:
    """Something has changed: do not wait for the next second."""
    _wake.set()


def running() -> bool:
    """Whether the thread that looks is there."""
    return _thread is not None


def _run() -> None:
    global _thread
    client: holder.PoolClient | None = None
    while True:
        _wake.clear()
        with _lock:
            if not _watchers:
                _thread = None
                break
        client, news = _look(client)
        for watcher in list(_watchers):
            try:
                watcher.hear(news)
            except Exception:  # one that cannot show it must not keep the others from it
                logging.getLogger(__name__).exception("what the pool said cannot be shown")
                forget(watcher)
        watcher = None  # not kept alive until the next look
        _wake.wait(EVERY_S)
    if client is not None:
        client.close()


def _look(client: holder.PoolClient | None) -> tuple[holder.PoolClient | None, News]:
    try:
        if client is None:
            client = holder.running_pool()
        if client is None:
            return None, News(time.time(), trouble="no GPU pool is running yet; a request starts one")
        lease = here.known(client)
        if lease is not None and lease.state.ended:
            lease = None
        return client, News(time.time(), client.pool(), lease)
    except PoolError as e:
        if client is not None:
            client.close()
        return None, News(time.time(), trouble=str(e))
