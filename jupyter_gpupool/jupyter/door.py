"""The way into the pool that this very process hosts, for its own threads."""

from __future__ import annotations

from ..api.discovery import PoolAddress

#: Set while a pool is hosted here, whether or not others may find it.
address: PoolAddress | None = None

#: Set once this server is shutting down: a kernel that is started all the same is not to start a pool of its own.
closed = False
