"""The way into the pool that this very process hosts, for its own threads."""

from __future__ import annotations

from weakref import WeakSet

from jupyter_client.multikernelmanager import MultiKernelManager

from ..api.discovery import PoolAddress

#: Set while a pool is hosted here, whether or not others may find it.
address: PoolAddress | None = None

#: Those of this process's Jupyter servers that are shutting down, by their kernel managers: a kernel that its restarter
#: starts then would have to start a pool of its own, and nobody would end it.
closing: WeakSet[MultiKernelManager] = WeakSet()
