"""The roles that issuers of tokens grant in namespaces, beside those that people give. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from jupyter_gpupool.core.models import Role

from .namespaces import DEFAULT, Namespaces


def changes(known: Namespaces, owner: str, issuer: str, roles: Mapping[str, Role]) -> dict[str, Role | None]:
    """Return which roles of a user to set, by namespace, and which to take away (None), for the ledger to say what
    the issuer grants. A role that a person gave stays as it is."""
    present = known.issued_roles(owner)
    found: dict[str, Role | None] = {
        name: None for name, (_, of) in present.items() if of == issuer and name not in roles
    }
    exist = {namespace.name for namespace in known.all()}
    for name, role in roles.items():
        has, of = present.get(name, (None, issuer))
        is_anybodys = name == DEFAULT and role is Role.USE and has is None
        if name in exist and of == issuer and has is not role and not is_anybodys:
            found[name] = role
    return found


def usable(known: Namespaces, roles: Mapping[str, Role]) -> list[str]:
    """Return the namespaces of these that exist; all of them while the pool has no namespaces."""
    exist = {namespace.name for namespace in known.all()}
    return [name for name in roles if name in exist or exist == {DEFAULT}]
