"""Namespaces and their members, the end of leases, and the audit trail.

The first argument of every call is the caller: ``owner``, or None for the pool's administrator.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from jupyter_gpupool.core.errors import PermissionDenied, PoolError
from jupyter_gpupool.core.models import Change, Lease, Role
from jupyter_gpupool.pool import usage_report
from jupyter_gpupool.pool.ledger.ledger import Ledger, Transaction
from jupyter_gpupool.pool.manager import Manager
from jupyter_gpupool.pool.scheduling.quotas import Holding, of_namespace
from jupyter_gpupool.pool.tenancy import audit_log, issued_roles
from jupyter_gpupool.pool.tenancy.audit_log import Entry
from jupyter_gpupool.pool.tenancy.namespaces import DEFAULT, Namespaces, to_json

T = TypeVar("T")


class OnLedger(Protocol):
    """Run a function of the ledger on the manager's thread."""

    async def __call__(self, function: Callable[[Ledger], T], /) -> T: ...


class OnManager(Protocol):
    """Run a function of the manager on its thread."""

    async def __call__(self, function: Callable[[Manager], T], /) -> T: ...


class Tenants:
    """The tenants of a pool that runs in this process. All methods raise :mod:`jupyter_gpupool.core.errors`."""

    def __init__(
        self,
        ledger: OnLedger,
        run: OnManager,
        carry_out: Callable[[Callable[[Manager], Change]], Awaitable[Any]],
        known: Callable[[], Awaitable[Namespaces]],
    ) -> None:
        """``carry_out`` makes a change, carries out its actions and returns its lease; ``known`` returns the
        namespaces as they are now."""
        self._with_ledger = ledger
        self._with_manager = run
        self._carry_out = carry_out
        self._known = known
        self._reporting = asyncio.Lock()

    async def whoami(self, owner: str | None, namespace: str = DEFAULT) -> dict[str, Any]:
        """Return ``{"owner", "administers", "namespace", "role", "namespaces": {name: role}}``."""

        def look(manager: Manager) -> dict[str, Any]:
            known = manager.known()
            roles = {of.name: _role(known, owner, of.name) for of in known.all()}
            return {
                "owner": audit_log.acting.get() or owner or "",
                "administers": owner is None,
                "namespace": namespace,
                "role": _role(known, owner, namespace),
                "namespaces": {name: role for name, role in roles.items() if role},
            }

        return await self._with_manager(look)

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        """Raise PermissionDenied unless the caller may request GPUs in that namespace."""
        if owner is None:
            return
        try:
            (await self._known()).check_use(owner, namespace)
        except PoolError as e:
            refusal = e
            await self._with_manager(lambda manager: manager.refused(owner, namespace, request_id, refusal))
            raise

    async def find(self, name: str) -> Namespaces:
        """Return the namespaces, which include that one. Raises UnknownNamespace."""
        known = await self._with_manager(lambda manager: manager.known())
        known.find(name)
        return known

    async def admit(self, owner: str, name: str) -> None:
        """Make the owner of a new token a member of its namespace, unless they are one. Raises UnknownNamespace."""
        known = await self.find(name)
        if known.role(owner, name) is None:
            await self.set_member(None, name, owner, Role.USE.value)

    async def set_issued_roles(self, owner: str, issuer: str, roles: Mapping[str, Role]) -> list[str]:
        """Make the roles that an issuer grants a user those of the ledger. Returns the namespaces that exist."""
        known = await self._known()
        changes = issued_roles.changes(known, owner, issuer, roles)
        if changes:
            words = ", ".join(f"{name}: {role.value if role else 'none'}" for name, role in changes.items())
            entry = Entry(0.0, "member issued", owner, f"{words}; by {issuer}", next(iter(changes)), owner)
            await self._carry_out(
                lambda manager: manager.administer(
                    lambda now, tx: now.set_issued(tx, owner, issuer, changes), entry
                )
            )
        return issued_roles.usable(known, roles)

    async def note(self, action: str, subject: str, namespace: str, outcome: str = "") -> None:
        """Write an entry of the audit trail for a change that was made elsewhere."""

        def write(ledger: Ledger) -> None:
            entry = Entry(time.time(), action, subject, outcome, namespace, audit_log.acting.get())
            with ledger.transaction() as tx:
                audit_log.write(tx, [entry])

        await self._with_ledger(write)

    async def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        """Return the caller's namespaces, with what is held in each."""

        known = await self._with_manager(lambda manager: manager.known())

        def look(ledger: Ledger) -> list[dict[str, Any]]:
            with ledger.reading() as tx:
                return _shown(known, tx, owner)

        return await self._with_ledger(look)

    async def create_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Create a namespace, as the pool's administrator."""

        def create(known: Namespaces, tx: Transaction) -> None:
            if owner is not None:
                raise PermissionDenied("only the pool's administrator makes namespaces")
            known.create(tx, name, fields)

        return await self._change(owner, name, "namespace create", _words(fields), create)

    async def change_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Change a namespace. Its own administrators may do so within what the pool's administrator has set."""
        return await self._change(
            owner,
            name,
            "namespace change",
            _words(fields),
            lambda known, tx: known.change(tx, name, fields, owner),
        )

    async def delete_namespace(self, owner: str | None, name: str) -> dict[str, Any]:
        """Delete a namespace. Raises NamespaceConflict while it has leases or tokens."""

        def delete(known: Namespaces, tx: Transaction) -> None:
            if owner is not None:
                raise PermissionDenied("only the pool's administrator deletes namespaces")
            known.delete(tx, name)

        await self._change(owner, name, "namespace delete", "", delete)
        return {}

    async def set_member(self, owner: str | None, name: str, user: str, role: str) -> dict[str, Any]:
        """Give a user a role in a namespace."""
        return await self._change(
            owner,
            name,
            "member set",
            f"{user}: {role}",
            lambda known, tx: known.set_member(tx, name, user, role, owner),
        )

    async def remove_member(self, owner: str | None, name: str, user: str) -> dict[str, Any]:
        """Take a user's role in a namespace away."""
        return await self._change(
            owner,
            name,
            "member remove",
            user,
            lambda known, tx: known.remove_member(tx, name, user, owner),
        )

    async def extend(self, owner: str | None, lease_id: str, seconds: float) -> Lease:
        """Postpone the end of a lease, as far as its namespace allows."""
        lease: Lease = await self._carry_out(lambda manager: manager.extend(lease_id, seconds, owner))
        return lease

    async def ask(self, owner: str | None, lease_id: str, message: str = "") -> dict[str, Any]:
        """Ask a lease's holder to release it. Returns only the lease's id and its owner."""
        by = audit_log.acting.get() or owner or "the pool's administrator"
        lease = await self._carry_out(lambda manager: manager.ask(lease_id, by, message, owner))
        return {"lease": lease.id, "owner": lease.request.owner}

    async def keep(self, owner: str | None, lease_id: str) -> Lease:
        """Keep a lease that somebody asked for, or that is idle."""
        lease: Lease = await self._carry_out(lambda manager: manager.keep(lease_id, owner))
        return lease

    async def audit(self, owner: str | None, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """Return the newest entries since a time, oldest first. For the pool's administrator."""
        if owner is not None:
            raise PermissionDenied("only the pool's administrator sees who asked for what")

        def look(ledger: Ledger) -> list[dict[str, Any]]:
            with ledger.reading() as tx:
                return [asdict(entry) for entry in audit_log.read(tx, since, limit)]

        return await self._with_ledger(look)

    async def usage(self, owner: str | None, by: str, since: float | None = None) -> dict[str, Any]:
        """Return GPU-hours by ``user``, ``namespace`` or ``gpu``: everybody's, or those of ``owner``."""
        reading = usage_report.Reading(time.time(), since, by, owner)
        async with self._reporting:  # a large pool's report takes seconds of a processor
            for step in reading.steps:
                await self._with_ledger(step)
            return await asyncio.to_thread(usage_report.report, reading)

    async def _change(
        self,
        owner: str | None,
        name: str,
        action: str,
        outcome: str,
        change: Callable[[Namespaces, Transaction], None],
    ) -> dict[str, Any]:
        who = audit_log.acting.get() or owner or ""
        await self._carry_out(
            lambda manager: manager.administer(change, Entry(0.0, action, name[:63], outcome, name[:63], who))
        )
        found = [of for of in await self.namespaces(owner) if of["name"] == name]
        return found[0] if found else {}


def _role(known: Namespaces, owner: str | None, name: str) -> str | None:
    if owner is None:
        return Role.ADMINISTER.value
    role = known.role(owner, name)
    return role.value if role else None


def _shown(known: Namespaces, tx: Transaction, owner: str | None) -> list[dict[str, Any]]:
    held = tx.held()
    shown = []
    for namespace in known.all():
        role = None if owner is None else known.role(owner, namespace.name)
        if owner is None or role is not None:
            shown.append(to_json(namespace, owner, role, of_namespace(held, namespace.name) or Holding()))
    return shown


def _words(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in fields.items())
