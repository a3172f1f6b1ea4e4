"""Namespaces: which exist, who may do what in them, and how to change them.

``default`` always exists, and every user may use it. While a pool has no other namespace, a request may name any.
Once there is another one, requests may name only those that exist.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import delete, insert, select, update

from jupyter_gpupool.core.errors import InvalidRequest, NamespaceConflict, PermissionDenied, UnknownNamespace
from jupyter_gpupool.core.models import Lease, Limits, Namespace, Reclaim, Role
from jupyter_gpupool.core.validation import check_namespace, check_text
from jupyter_gpupool.pool.ledger.ledger import Transaction
from jupyter_gpupool.pool.ledger.queries import LIVE
from jupyter_gpupool.pool.ledger.tables import leases, members, namespaces, tokens
from jupyter_gpupool.pool.scheduling.quotas import lowest

DEFAULT = "default"
_RANK = {role: rank for rank, role in enumerate(Role)}
_MAX_NAMESPACES = 10_000


class Namespaces:
    """The namespaces as last read from the ledger. Methods that change them are called on the ledger's thread."""

    def __init__(self) -> None:
        self._known: dict[str, Namespace] = {DEFAULT: Namespace(DEFAULT)}
        self._issuers: dict[
            tuple[str, str], str | None
        ] = {}  # (user, namespace) → the issuer that grants the role
        #: Counts changes: while it is the same, every permission is, too.
        self.version = 0

    def read(self, tx: Transaction) -> bool:
        """Read them again; returns whether anything has changed."""
        of: dict[str, dict[str, Role]] = {}
        issuers: dict[tuple[str, str], str | None] = {}
        for row in tx.execute(select(members).order_by(members.c.owner)):
            of.setdefault(row.namespace, {})[row.owner] = Role(row.role)
            issuers[row.owner, row.namespace] = row.issuer
        known = {DEFAULT: Namespace(DEFAULT)}
        for row in tx.execute(select(namespaces).order_by(namespaces.c.name)):
            known[row.name] = Namespace(
                row.name,
                row.description,
                Limits(**json.loads(row.limits)),
                Limits(**json.loads(row.ceiling)),
                row.weight,
                row.names_holders,
                of.get(row.name, {}),
                Reclaim(row.reclaim) if row.reclaim else None,
            )
        before, self._known = self._known, known
        self._issuers = issuers
        self.version += before != known
        return before != known

    # -- which exist

    def all(self) -> list[Namespace]:
        """Every namespace, ``default`` first."""
        return list(self._known.values())

    def find(self, name: str) -> Namespace:
        """One namespace. Raises UnknownNamespace."""
        if name not in self._known:
            raise UnknownNamespace(
                f"this pool has no namespace {str(name)[:63]!r}; its administrator creates one with "
                f"`gpupool namespace create`"
            )
        return self._known[name]

    def of_request(self, name: str) -> Namespace:
        """The namespace that a request names. Raises UnknownNamespace, if there are others than ``default``."""
        if len(self._known) == 1 and name not in self._known:
            return Namespace(name)
        return self.find(name)

    def of_lease(self, name: str) -> Namespace:
        """The namespace of a lease; it may have been deleted since."""
        return self._known.get(name) or Namespace(name)

    def weights(self) -> dict[str, float]:
        """The weight of each namespace."""
        return {name: namespace.weight for name, namespace in self._known.items()}

    # -- who may do what

    def role(self, owner: str, name: str) -> Role | None:
        """The user's role in a namespace; None if they may do nothing there."""
        namespace = self._known.get(name)
        anybodys = Role.USE if name == DEFAULT or len(self._known) == 1 else None
        return namespace.members.get(owner, anybodys) if namespace else anybodys

    def issued_roles(self, owner: str) -> dict[str, tuple[Role, str | None]]:
        """The roles that the ledger has of a user, by namespace, each with the issuer that grants it."""
        return {
            name: (of.members[owner], self._issuers.get((owner, name)))
            for name, of in self._known.items()
            if owner in of.members
        }

    def managed(self, owner: str | None) -> list[str]:
        """The namespaces that the user administers."""
        if owner is None:
            return []
        return [name for name, of in self._known.items() if of.members.get(owner) is Role.ADMINISTER]

    def manages(self, owner: str | None, lease: Lease) -> bool:
        """Whether the user may see and release the lease. ``owner`` None: the pool's administrator."""
        request = lease.request
        return owner in (None, request.owner) or self._is(str(owner), request.namespace, Role.ADMINISTER)

    def sees_holder(self, owner: str | None, lease: Lease) -> bool:
        """Whether the user may see who holds the lease."""
        if self.manages(owner, lease):
            return True
        name = lease.request.namespace
        namespace = self._known.get(name)
        return bool(namespace and namespace.names_holders) and self._is(str(owner), name, Role.VIEW)

    def check_use(self, owner: str, name: str) -> None:
        """Raise PermissionDenied unless the user may request slices there, and UnknownNamespace."""
        self.of_request(name)
        role = self.role(owner, name)
        if role is None:
            raise PermissionDenied(
                f"you are not a member of the namespace {name!r}; ask its administrators to add {owner!r}"
            )
        if _RANK[role] < _RANK[Role.USE]:
            raise PermissionDenied(
                f"you may look at the namespace {name!r}, not use it; ask its administrators"
            )

    def check_administers(self, owner: str | None, name: str) -> None:
        """Raise PermissionDenied unless the user may change the namespace, and UnknownNamespace."""
        self.find(name)
        if owner is None:
            return
        role = self.role(owner, name)
        if role is None:
            raise UnknownNamespace(f"there is no namespace {name!r}, or you are not a member of it")
        if role is not Role.ADMINISTER:
            raise PermissionDenied(f"you do not administer the namespace {name!r}")

    def _is(self, owner: str, name: str, least: Role) -> bool:
        role = self.role(owner, name)
        return role is not None and _RANK[role] >= _RANK[least]

    # -- how that is changed

    def create(self, tx: Transaction, name: str, fields: Mapping[str, Any]) -> None:
        """Create a namespace. Raises InvalidRequest and NamespaceConflict."""
        check_namespace(name)
        if name in self._known:
            raise NamespaceConflict(f"the namespace {name!r} exists already; change it instead")
        if len(self._known) >= _MAX_NAMESPACES:
            raise NamespaceConflict(
                f"there are {len(self._known)} namespaces, which is the most a pool may have; delete one first"
            )
        namespace = _changed(Namespace(name), fields, None)
        _insert(tx, namespace)
        self._set_members(tx, namespace, fields, None)

    def change(self, tx: Transaction, name: str, fields: Mapping[str, Any], owner: str | None) -> None:
        """Change a namespace. ``owner`` None: the pool's administrator; others keep to the ceiling."""
        self.check_administers(owner, name)
        changed = _changed(self._known[name], fields, owner)
        statement = update(namespaces).where(namespaces.c.name == name).values(**_row(changed))
        if tx.execute(statement).rowcount == 0:
            _insert(tx, changed)
        self._set_members(tx, changed, fields, owner)

    def _set_members(
        self, tx: Transaction, namespace: Namespace, fields: Mapping[str, Any], owner: str | None
    ) -> None:
        """``fields["members"]``: roles by user; None removes a user."""
        for user, role in fields.get("members", {}).items():
            if role is not None:
                self._set_member(tx, namespace, user, role, owner)
            elif user in namespace.members:
                self._remove_member(tx, namespace, user, owner)

    def delete(self, tx: Transaction, name: str) -> None:
        """Delete a namespace. Raises NamespaceConflict while it has live leases or tokens."""
        self.find(name)
        if name == DEFAULT:
            raise NamespaceConflict("the namespace 'default' cannot be deleted; its limits can be changed")
        states = [state.value for state in LIVE]
        live = tx.execute(
            select(leases.c.id).where(leases.c.namespace == name, leases.c.state.in_(states))
        ).all()
        if live:
            raise NamespaceConflict(
                f"the namespace {name!r} has {len(live)} live leases and requests; release them first"
            )
        admits = tx.execute(
            select(tokens.c.id).where(tokens.c.namespace == name, tokens.c.revoked_at.is_(None))
        ).all()
        if admits:
            raise NamespaceConflict(
                f"the namespace {name!r} has {len(admits)} tokens; revoke them first (gpupool token list)"
            )
        tx.execute(delete(members).where(members.c.namespace == name))
        tx.execute(delete(namespaces).where(namespaces.c.name == name))

    def set_member(self, tx: Transaction, name: str, user: str, role: str, owner: str | None) -> None:
        """Add a member, or change their role. Raises InvalidRequest, PermissionDenied and UnknownNamespace."""
        self.check_administers(owner, name)
        if tx.execute(select(namespaces.c.name).where(namespaces.c.name == name)).first() is None:
            _insert(tx, self._known[name])
        self._set_member(tx, self._known[name], user, role, owner)

    def set_issued(self, tx: Transaction, user: str, issuer: str, roles: Mapping[str, Role | None]) -> None:
        """Change the roles that an issuer grants a user, by namespace; None takes one away."""
        for name, role in roles.items():
            namespace = self._known.get(name)
            if namespace is None:  # deleted a moment ago
                continue
            if role is None:
                self._remove_member(tx, namespace, user, None)
                continue
            self.set_member(tx, name, user, role.value, None)
            which = (members.c.namespace == name) & (members.c.owner == user)
            tx.execute(update(members).where(which).values(issuer=issuer))

    def remove_member(self, tx: Transaction, name: str, user: str, owner: str | None) -> None:
        """Remove a member. Their leases go on, but they cannot request more."""
        self.check_administers(owner, name)
        if user not in self._known[name].members:
            raise UnknownNamespace(f"{user[:60]!r} is not a member of the namespace {name!r}")
        self._remove_member(tx, self._known[name], user, owner)

    def _set_member(
        self, tx: Transaction, namespace: Namespace, user: str, role: object, owner: str | None
    ) -> None:
        check_text("user", user)
        if not user.strip():
            raise InvalidRequest("a member has a name")
        if role not in [known.value for known in Role]:
            raise InvalidRequest(f"a role is {', '.join(known.value for known in Role)}")
        _keep_self(namespace, user, owner, role)
        which = (members.c.namespace == namespace.name) & (members.c.owner == user)
        if tx.execute(update(members).where(which).values(role=role, issuer=None)).rowcount == 0:
            tx.execute(insert(members).values(namespace=namespace.name, owner=user, role=role))

    def _remove_member(self, tx: Transaction, namespace: Namespace, user: str, owner: str | None) -> None:
        _keep_self(namespace, user, owner, None)
        which = (members.c.namespace == namespace.name) & (members.c.owner == user)
        tx.execute(delete(members).where(which))


def _keep_self(namespace: Namespace, user: str, owner: str | None, role: object) -> None:
    """Refuse that an administrator of a namespace locks themselves out by mistake."""
    if owner == user and role != Role.ADMINISTER.value:
        raise PermissionDenied(
            f"you would not administer the namespace {namespace.name!r} any more; "
            "another administrator of it can do that"
        )


def to_json(namespace: Namespace, owner: str | None, role: Role | None, held: Any) -> dict[str, Any]:
    """A namespace as ``owner`` may see it. None: the pool's administrator."""
    everybody = owner is None or role is Role.ADMINISTER or namespace.names_holders
    return {
        "name": namespace.name,
        "description": namespace.description,
        "limits": asdict(namespace.limits),
        "ceiling": asdict(namespace.ceiling),
        "weight": namespace.weight,
        "names_holders": namespace.names_holders,
        "reclaim": namespace.reclaim and namespace.reclaim.value,
        "members": {user: of.value for user, of in namespace.members.items() if everybody or user == owner},
        "role": Role.ADMINISTER.value if owner is None else role and role.value,
        "held": {**asdict(held), "gpus": round(held.gpus, 4)},
    }


def _row(namespace: Namespace) -> dict[str, Any]:
    return {
        "description": namespace.description,
        "limits": _packed(namespace.limits),
        "ceiling": _packed(namespace.ceiling),
        "weight": namespace.weight,
        "names_holders": namespace.names_holders,
        "reclaim": namespace.reclaim and namespace.reclaim.value,
    }


def _packed(limits: Limits) -> str:
    return json.dumps({name: value for name, value in asdict(limits).items() if value is not None})


def _insert(tx: Transaction, namespace: Namespace) -> None:
    tx.execute(insert(namespaces).values(name=namespace.name, **_row(namespace)))


def _changed(namespace: Namespace, fields: Mapping[str, Any], owner: str | None) -> Namespace:
    """The namespace with other values. Raises InvalidRequest, and PermissionDenied beyond its ceiling."""
    description = fields.get("description", namespace.description)
    check_text("description", description)
    weight = fields.get("weight", namespace.weight)
    if not _is_number(weight) or not 0.001 <= weight <= 1000:
        raise InvalidRequest("a namespace's weight is a number from 0.001 to 1000")
    if owner is not None and weight != namespace.weight:
        raise PermissionDenied("only the pool's administrator can change a namespace's weight")
    names = fields.get("names_holders", namespace.names_holders)
    if not isinstance(names, bool):
        raise InvalidRequest("names_holders is true or false")
    reclaim = fields.get("reclaim", namespace.reclaim)
    if reclaim is not None and reclaim not in [known.value for known in Reclaim]:
        raise InvalidRequest(f"reclaim is {', '.join(known.value for known in Reclaim)} or null")
    given = fields.get("limits", {})
    check_limits(given)
    if owner is None:
        ceiling = replace(namespace.ceiling, **given)
        limits = lowest(ceiling, replace(namespace.limits, **dict.fromkeys(given)))
    else:
        ceiling = namespace.ceiling
        for name, value in given.items():
            most = getattr(ceiling, name)
            if most is not None and value is not None and value > most:
                raise PermissionDenied(
                    f"the pool's administrator allows {name} up to {most:g}, not {value:g}"
                )
        limits = lowest(ceiling, replace(namespace.limits, **given))
    return replace(
        namespace,
        description=description,
        weight=float(weight),
        names_holders=names,
        reclaim=None if reclaim is None else Reclaim(reclaim),
        limits=limits,
        ceiling=ceiling,
    )


#: Limit → its minimum, whether it is a whole number, and its maximum.
_LIMITS = {
    "memory_mib": (0, True, 2**50),
    "gpus": (0, False, 10**6),
    "leases": (0, True, 10**9),
    "user_share": (0.001, False, 1),
    "lease_s": (1, False, 10**9),
    "idle_s": (1, False, 10**9),
    "reclaim_after_s": (1, False, 10**9),
}
LIMITS: Sequence[str] = tuple(_LIMITS)


def check_limits(limits: object) -> None:
    """Raise InvalidRequest unless these are limits by name, each of them a number or None."""
    if not isinstance(limits, Mapping):
        raise InvalidRequest("limits are an object")
    for name, value in limits.items():
        if name not in _LIMITS:
            raise InvalidRequest(f"unknown limit {str(name)[:40]!r}; there are {', '.join(_LIMITS)}")
        least, whole, most = _LIMITS[name]
        if value is None:
            continue
        if not _is_number(value) or not least <= value <= most or (whole and not isinstance(value, int)):
            kind = "a whole number" if whole else "a number"
            raise InvalidRequest(f"{name} is {kind} from {least:g} to {most:g}, or null for no limit")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
