"""What the two ends of the data plane are told before they meet. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AttachSpec:
        fields = json.loads(text)
        fields["devices"] = tuple(DeviceSpec(**d) for d in fields["devices"])
        return cls(**fields)


#: Exit codes by which a worker tells its engine why it ended; any other code means that it died.
EXIT_RELEASED = 0
EXIT_HOLDER_LOST = 10
EXIT_NEVER_ATTACHED = 11
EXIT_FENCED = 12
EXIT_STOPPED = 13
