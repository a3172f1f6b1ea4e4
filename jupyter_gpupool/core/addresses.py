"""Group network addresses by their likely owner, to limit connections and attempts per owner."""

from __future__ import annotations

import ipaddress


def network(address: str) -> str:
    """Return an IPv4 address itself, and the /64 network of an IPv6 address, which belongs to one owner."""
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
