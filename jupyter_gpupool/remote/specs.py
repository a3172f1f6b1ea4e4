"""What the two ends of the data plane are told before they meet. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

#: Raised by one whenever the wire format changes; the handshake refuses a different one.
PROTOCOL = 3


@dataclass(frozen=True)
class DeviceSpec:
    """One slice, as a worker and its clients know it: ``index`` counts from 0 within the lease.

    ``limit_mib`` is the slice's memory in MiB, ``total_mib`` the whole GPU's.
    """

    index: int
    uuid: str
    name: str
    limit_mib: int
    total_mib: int
    emulated: bool


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to know of its lease; times in seconds."""

    lease_id: str
    secret_sha256: str
    devices: tuple[DeviceSpec, ...]
    attach_timeout_s: float = 4.0
    ttl_s: float = 15.0
    #: With these files (PEM) the worker speaks TLS alone.
    certfile: str = ""
    keyfile: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorkerSpec:
        fields = dict(data)
        fields["devices"] = tuple(DeviceSpec(**d) for d in fields["devices"])
        return cls(**fields)


@dataclass(frozen=True)
class AttachSpec:
    """What a client process needs to reach its worker. ``mode`` is "remote" or "direct".

    ``addresses``: of a lease that spans servers, the (host, port) of each device's worker; empty where ``host`` and
    ``port`` serve them all.
    ``secure``: only through TLS, with a server that ``ca`` (PEM text; empty: the system's CAs) vouches for.
    """

    lease_id: str
    host: str
    port: int
    secret: str
    devices: tuple[DeviceSpec, ...]
    ttl_s: float = 15.0
    mode: str = "remote"
    secure: bool = False
    ca: str = ""
    addresses: tuple[tuple[str, int], ...] = ()

    def parts(self) -> tuple[AttachSpec, ...]:
        """One for each of the lease's workers, with the devices that it serves."""
        if not self.addresses:
            return (self,)
        served: dict[tuple[str, int], list[DeviceSpec]] = {}
        for address, device in zip(self.addresses, self.devices):
            served.setdefault(address, []).append(device)
        return tuple(
            replace(self, host=host, port=port, devices=tuple(devices), addresses=())
            for (host, port), devices in served.items()
        )

    def to_json(self) -> str:
        fields = asdict(self)
        if not self.addresses:  # a process of another version may read it
            del fields["addresses"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> AttachSpec:
        fields = json.loads(text)
        fields["devices"] = tuple(DeviceSpec(**d) for d in fields["devices"])
        fields["addresses"] = tuple((host, port) for host, port in fields.get("addresses", ()))
        return cls(**fields)


#: Exit codes by which a worker tells its engine why it ended; any other code means that it died.
EXIT_RELEASED = 0
EXIT_HOLDER_LOST = 10
EXIT_NEVER_ATTACHED = 11
EXIT_FENCED = 12
EXIT_STOPPED = 13
