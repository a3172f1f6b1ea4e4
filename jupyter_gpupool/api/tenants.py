"""Who may hold what, and who is asked for it: namespaces, the end of leases, and the audit trail.

The caller comes first in every call: ``owner``, or None for the pool's administrator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..pool import audit
from ..pool.audit import Entry
from ..pool.errors import NotAllowed, PoolError
from ..pool.ledger import Ledger, Transaction
from ..pool.limits import Holding, of_namespace
from ..pool.manager import Manager
from ..pool.models import Lease, Role
from ..pool.namespaces import DEFAULT, Namespaces, to_json

if TYPE_CHECKING:
    from .service import PoolService


class Tenants:
    """The tenants of a pool that runs here. All methods raise :mod:`jupyter_gpupool.pool.errors`."""

    def __init__(self, service: PoolService) -> None:
        self._service = service

    async def whoami(self, owner: str | None, namespace: str = DEFAULT) -> dict[str, Any]:
        """``{"owner", "administers", "namespace", "role", "namespaces": {name: role}}``."""

        def look(manager: Manager) -> dict[str, Any]:
            known = manager.known()
            roles = {of.name: _role(known, owner, of.name) for of in known.all()}
            return {
                "owner": audit.acting.get() or owner or "",
                "administers": owner is None,
                "namespace": namespace,
                "role": _role(known, owner, namespace),
                "namespaces": {name: role for name, role in roles.items() if role},
            }

        return await self._service.with_manager(look)

    async def check_use(self, owner: str | None, namespace: str, request_id: str = "") -> None:
        """Raise NotAllowed unless the caller may request slices there."""
        if owner is None:
            return
        try:
            (await self._service.namespaces()).check_use(owner, namespace)
        except PoolError as e:
            refusal = e
            await self._service.with_manager(
                lambda manager: manager.refused(owner, namespace, request_id, refusal)
            )
            raise

    async def find(self, name: str) -> Namespaces:
        """Raises UnknownNamespace."""
        known = await self._service.with_manager(lambda manager: manager.known())
        known.find(name)
        return known

    async def admit(self, owner: str, name: str) -> None:
        """Somebody is given a token of that namespace: unless they are a member already, they may use it. Raises
        UnknownNamespace."""
        known = await self.find(name)
        if known.role(owner, name) is None:
            await self.set_member(None, name, owner, Role.USE.value)

    async def note(self, action: str, subject: str, namespace: str, outcome: str = "") -> None:
        """For the audit trail, of what is done elsewhere."""

        def write(ledger: Ledger) -> None:
            entry = Entry(time.time(), action, subject, outcome, namespace, audit.acting.get())
            with ledger.transaction() as tx:
                audit.write(tx, [entry])

        await self._service.with_ledger(write)

    async def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        """Those that the caller is a member of, with what is held there."""

        known = await self._service.with_manager(lambda manager: manager.known())

        def look(ledger: Ledger) -> list[dict[str, Any]]:
            with ledger.reading() as tx:
                return _shown(known, tx, owner)

        return await self._service.with_ledger(look)

    async def create_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        def create(known: Namespaces, tx: Transaction) -> None:
            if owner is not None:
                raise NotAllowed("only the pool's administrator makes namespaces")
            known.create(tx, name, fields)

        return await self._change(owner, name, "namespace create", _words(fields), create)

    async def change_namespace(
        self, owner: str | None, name: str, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """An administrator of the namespace may change it within what the pool's administrator has set."""
        return await self._change(
            owner,
            name,
            "namespace change",
            _words(fields),
            lambda known, tx: known.change(tx, name, fields, owner),
        )

    async def delete_namespace(self, owner: str | None, name: str) -> dict[str, Any]:
        """Raises NamespaceConflict while leases or tokens are of it."""

        def delete(known: Namespaces, tx: Transaction) -> None:
            if owner is not None:
                raise NotAllowed("only the pool's administrator deletes namespaces")
            known.delete(tx, name)

        await self._change(owner, name, "namespace delete", "", delete)
        return {}

    async def set_member(self, owner: str | None, name: str, user: str, role: str) -> dict[str, Any]:
        return await self._change(
            owner,
            name,
            "member set",
            f"{user}: {role}",
            lambda known, tx: known.set_member(tx, name, user, role, owner),
        )

    async def remove_member(self, owner: str | None, name: str, user: str) -> dict[str, Any]:
        return await self._change(
            owner,
            name,
            "member remove",
            user,
            lambda known, tx: known.remove_member(tx, name, user, owner),
        )

    async def extend(self, owner: str | None, lease_id: str, seconds: float) -> Lease:
        return await self._service.carry_out(lambda manager: manager.extend(lease_id, seconds, owner))

    async def ask(self, owner: str | None, lease_id: str, message: str = "") -> dict[str, Any]:
        """Who asks may know whose lease it is, and is told nothing more of it."""
        by = audit.acting.get() or owner or "the pool's administrator"
        lease = await self._service.carry_out(lambda manager: manager.ask(lease_id, by, message, owner))
        return {"lease": lease.id, "owner": lease.request.owner}

    async def keep(self, owner: str | None, lease_id: str) -> Lease:
        return await self._service.carry_out(lambda manager: manager.keep(lease_id, owner))

    async def audit(self, owner: str | None, since: float = 0.0, limit: int = 200) -> list[dict[str, Any]]:
        """The newest entries since then, oldest first; for the pool's administrator."""
        if owner is not None:
            raise NotAllowed("only the pool's administrator sees who asked for what")

        def look(ledger: Ledger) -> list[dict[str, Any]]:
            with ledger.reading() as tx:
                return [asdict(entry) for entry in audit.read(tx, since, limit)]

        return await self._service.with_ledger(look)

    async def _change(
        self,
        owner: str | None,
        name: str,
        action: str,
        outcome: str,
        change: Callable[[Namespaces, Transaction], None],
    ) -> dict[str, Any]:
        who = audit.acting.get() or owner or ""
        await self._service.carry_out(
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
