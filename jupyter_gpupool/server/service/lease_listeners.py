"""Notifies listeners of every change of a lease's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jupyter_gpupool.core.models import Lease, LeaseState

Listener = Callable[[dict[str, Any]], None]


class Listeners:
    """Each change is ``{"type": "lease", "lease": Lease.to_json(), "previous": its state before, or None}``."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._states: dict[str, LeaseState] = {}  # of live leases, as last notified

    def remember(self, live: Iterable[Lease]) -> None:
        """Set the states of leases that exist already, so that they are not notified as changes."""
        self._states = {lease.id: lease.state for lease in live}

    def add(self, listener: Listener) -> Callable[[], None]:
        """Notify ``listener`` from now on. Returns a function that ends this."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def notify(self, lease: Lease) -> None:
        """Log a lease's new state, and call every listener with it."""
        self._log.info(
            "Lease %s is %s%s",
            lease.id,
            lease.state.value,
            f": {lease.reason}" if lease.reason else "",
            extra={"lease": lease.id, "state": lease.state.value, "owner": lease.request.owner},
        )
        previous = self._states.pop(lease.id, None)
        if not lease.state.ended:
            self._states[lease.id] = lease.state
        change = {"type": "lease", "lease": lease.to_json(), "previous": previous and previous.value}
        for listener in list(self._listeners):
            try:
                listener(change)
            except Exception:  # a listener must not disturb the pool
                self._log.exception("A listener failed on lease %s", lease.id)
