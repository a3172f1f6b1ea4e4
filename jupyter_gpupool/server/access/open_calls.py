"""How many calls that stay open a user and a namespace may have at once: event streams, and calls that wait."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from traitlets import Int
from traitlets.config import Configurable

from jupyter_gpupool.core.errors import TooManyRequests

from .authentication import Caller

#: After how many seconds a call that was refused is worth another try: one of the open ones may have ended by then.
_RETRY_S = 5.0


class OpenCallLimits(Configurable):
    """The limits of one server on open event streams and waiting calls. Administrators have none."""

    per_user = Int(
        100,
        min=0,
        help="Event streams and waiting calls that one user, by all tokens together, may have open. 0: any number.",
    ).tag(config=True)
    per_namespace = Int(
        1000,
        min=0,
        help="Event streams and waiting calls that one namespace's tokens may have open. 0: any number.",
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._open: Counter[tuple[str, str]] = Counter()

    def open(self, caller: Caller) -> Callable[[], None]:
        """Count one more, and return what counts it no longer, which may be called again. Raises TooManyRequests."""
        if caller.administers:
            return lambda: None
        counted = []
        for whose, scope, name, most in (
            ("this user's tokens together have", "user", caller.owner, self.per_user),
            ("this namespace's tokens together have", "namespace", caller.namespace, self.per_namespace),
        ):
            if not name or not most:
                continue
            if self._open[scope, name] >= most:
                raise TooManyRequests(
                    f"{whose} {most} event streams and waiting calls open, and may have no more; close some, or ask "
                    f"the pool's administrator for a higher limit",
                    _RETRY_S,
                )
            counted.append((scope, name))
        self._open.update(counted)

        def close() -> None:
            while counted:
                key = counted.pop()
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]

        return close

    @contextlib.contextmanager
    def waiting(self, caller: Caller, wait_s: float) -> Iterator[None]:
        """Count a call while it waits, if it does. Raises TooManyRequests."""
        close = self.open(caller) if wait_s > 0 else lambda: None
        try:
            yield
        finally:
            close()
