"""How the background work of a pool reaches its manager."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from jupyter_gpupool.core.models import Change
from jupyter_gpupool.pool.manager import Manager


@dataclass(frozen=True)
class ManagerAccess:
    """The ways to the manager that works beside requests are given."""

    #: runs a function on the manager's thread
    call: Callable[..., Awaitable[Any]]
    #: makes a change there and carries out its actions
    run: Callable[..., Awaitable[Change]]
    #: the manager, or None while there is none
    manager: Callable[[], Manager | None]
    #: runs a coroutine in the background
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    log: Any
