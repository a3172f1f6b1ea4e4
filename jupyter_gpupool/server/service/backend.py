"""What the handlers of the HTTP interface may ask of a pool, wherever that pool runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jupyter_gpupool.core.checks import Check
from jupyter_gpupool.core.models import Lease, Request
from jupyter_gpupool.pool.tenancy.namespaces import Namespaces

__all__ = ["PoolBackend", "TenantsBackend"]


class PoolBackend(Protocol):
    """A pool that runs in this process, or one in another process that is reached over HTTP.

    ``owner`` is the caller's name, or None for an administrator, who sees every lease.
    All methods raise :mod:`jupyter_gpupool.core.errors`.
    """

    @property
    def tenants(self) -> TenantsBackend:
        """The pool's namespaces, members and audit trail."""

    def scope(self, owner: str) -> str | None:
        """Return whose leases ``owner`` sees: a name, or None for everybody's."""

    def named(self, owner: str) -> str:
        """Return the name under which ``owner`` holds leases."""

    async def pool(self, owner: str | None) -> dict[str, Any]:
        """Return the pool's servers, GPUs and leases as JSON, as far as ``owner`` may see them."""

    async def look(self) -> tuple[dict[str, Any], list[Lease], Namespaces]:
        """Return the whole pool, its live leases, and its namespaces, for a feed that serves many watchers."""

    async def leases(self, owner: str | None, include_ended: bool = False) -> list[Lease]:
        """Return the leases that ``owner`` sees."""

    async def request(self, request: Request, wait_s: float = 0.0) -> Lease:
        """Grant, queue or refuse a request.

        With ``wait_s``, return when its worker runs, or after that many seconds.
        """

    async def forecast(self, request: Request) -> dict[str, Any]:
        """Return the outcome of a request if it were made now, without making it."""

    async def wait(
        self,
        lease_id: str,
        owner: str | None,
        wait_s: float,
        state: str | None = None,
        position: int | None = None,
    ) -> Lease:
        """Return the lease as soon as it differs from ``state`` and ``position``, or after ``wait_s`` seconds."""

    async def heartbeat(self, lease_id: str, owner: str | None) -> Lease:
        """Keep a lease alive."""

    async def release(self, lease_id: str, owner: str | None, reason: str = "released") -> Lease:
        """End a lease. When this returns, its worker has stopped.

        A pool in another process gives its own reason.
        """

    async def resize(
        self, lease_id: str, owner: str | None, partial: float | None, memory_mib: int | None
    ) -> Lease:
        """Change how much of its GPUs a lease holds. When this returns, its worker keeps to the new limit."""

    async def history(
        self, since: float | None, step: int | None = None, gpus: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """Return utilization since a time in seconds since the epoch. Default: the last hour."""

    async def health(self) -> tuple[float, tuple[Check, ...]]:
        """Return when the pool was last checked, in seconds since the epoch, and each check's result."""

    def listen(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call ``callback`` for every change of a lease's state. Returns a function that ends this."""


class TenantsBackend(Protocol):
    """The namespaces, members and audit trail of a pool, as far as ``owner`` (None: an administrator) may."""

    async def whoami(self, owner: str | None, namespace: str) -> dict[str, Any]:
        """Return the caller's name, and its roles by namespace."""

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        """Raise PermissionDenied unless the caller may request GPUs in that namespace."""

    async def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        """Return the caller's namespaces, with what is held in each."""

    async def create_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Create a namespace."""

    async def change_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Change the named fields of a namespace."""

    async def delete_namespace(self, owner: str | None, name: str) -> dict[str, Any]:
        """Delete a namespace. Raises NamespaceConflict while it has leases or tokens."""

    async def set_member(self, owner: str | None, name: str, user: str, role: str) -> dict[str, Any]:
        """Give a user a role in a namespace."""

    async def remove_member(self, owner: str | None, name: str, user: str) -> dict[str, Any]:
        """Take a user's role in a namespace away."""

    async def extend(self, owner: str | None, lease_id: str, seconds: float) -> Lease:
        """Postpone the end of a lease."""

    async def ask(self, owner: str | None, lease_id: str, message: str = "") -> dict[str, Any]:
        """Ask a lease's holder to release it."""

    async def keep(self, owner: str | None, lease_id: str) -> Lease:
        """Answer such a question: the holder keeps its lease."""

    async def audit(self, owner: str | None, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """Return the newest audit entries since a time, oldest first. For administrators."""

    async def usage(self, owner: str | None, by: str, since: float | None = None) -> dict[str, Any]:
        """Return GPU-hours by ``user``, ``namespace`` or ``gpu``: everybody's, or those of ``owner``."""
