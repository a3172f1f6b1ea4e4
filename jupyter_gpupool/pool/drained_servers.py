"""The drained GPU servers, on which no new lease is placed, as the ledger records them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import bindparam, delete, insert, select

from jupyter_gpupool.core.errors import UnknownServer
from jupyter_gpupool.core.models import Server

from .ledger.ledger import Transaction
from .ledger.tables import drained

_NAMES = select(drained.c.server)
_ADD = insert(drained)
_REMOVE = delete(drained).where(drained.c.server == bindparam("name"))


def marked(tx: Transaction, servers: Sequence[Server]) -> tuple[Server, ...]:
    """The servers, each marked with whether it is drained."""
    names = _names(tx)
    return tuple(replace(server, draining=server.name in names) for server in servers)


def set_drained(tx: Transaction, server: str, draining: bool, now: float, servers: Sequence[Server]) -> None:
    """Record whether a server is drained; repeating it is harmless. Raises UnknownServer."""
    names = _names(tx)
    if server not in names and server not in {s.name for s in servers}:
        raise UnknownServer(f"the pool has no GPU server {server[:60]!r}; see gpupool gpus")
    if draining and server not in names:
        tx.execute(_ADD, {"server": server, "since": now})
    elif not draining:
        tx.execute(_REMOVE, {"name": server})


def _names(tx: Transaction) -> set[str]:
    return {row.server for row in tx.execute(_NAMES)}
