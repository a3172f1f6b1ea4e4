"""Those who are told of every lease's change of state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..pool.models import Lease, LeaseState

Listener = Callable[[dict[str, Any]], None]


class Listeners:
    """Tells each change as ``{"type": "lease", "lease": Lease.to_json(), "previous": its state before, or None}``."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._states: dict[str, LeaseState] = {}  # of live leases, as was told last

    def know(self, live: Iterable[Lease]) -> None:
        """What is there already is no news."""
        self._states = {lease.id: lease.state for lease in live}

    def add(self, listener: Listener) -> Callable[[], None]:
        """Until the answer is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def tell(self, lease: Lease) -> None:
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
            except Exception:  # who watches must not disturb what is watched
                self._log.exception("A listener failed on lease %s", lease.id)
