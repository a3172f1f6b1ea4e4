"""State of this process: the address of the pool that it hosts, and the servers that are shutting down."""

from __future__ import annotations

from weakref import WeakSet

from jupyter_client.multikernelmanager import MultiKernelManager

from jupyter_gpupool.client.discovery import PoolAddress

#: The hosted pool's address, for this process's own threads. Set even if the pool is not shared.
address: PoolAddress | None = None

#: The kernel managers of this process's Jupyter servers that are shutting down. A kernel that a restarter starts then
#: would start a pool that nobody ends.
closing: WeakSet[MultiKernelManager] = WeakSet()
