"""Whom an address stands for, where connections and attempts are counted by it."""

from __future__ import annotations

import ipaddress


def network(address: str) -> str:
    """An IPv4 address by itself; of IPv6 the /64, every address of which is its one owner's to use."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        if not found.is_loopback:
            return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
