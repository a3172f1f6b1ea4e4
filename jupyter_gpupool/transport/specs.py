"""What a worker and its clients need before they connect. Independent of PyTorch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

#: Version of the wire format, increased with each change; the handshake refuses any other version.
PROTOCOL = 6


@dataclass(frozen=True)
class DeviceSpec:
    """One slice for a worker and its clients. ``index`` counts from 0 within the lease.

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
    """Everything a worker needs about its lease. Times are in seconds."""

    lease_id: str
    secret_sha256: str
    devices: tuple[DeviceSpec, ...]
    attach_timeout_s: float = 4.0
    ttl_s: float = 15.0
    #: How long the worker waits for a client or a holder whose connection was lost.
    resume_s: float = 120.0
    #: How much a client sends ahead of the worker's acknowledgements.
    window_mib: int = 64
    #: This worker's own certificate and key (PEM files). With them it accepts only TLS.
    certfile: str = ""
    keyfile: str = ""
    #: The lease has another worker, which is about to send its state; nobody is served before that.
    awaits_state: bool = False
    #: By which the lease's workers on other servers know this one; empty: by its first device's uuid.
    peer_name: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorkerSpec:
        """Return the spec from its JSON form."""
        fields = dict(data)
        fields["devices"] = tuple(DeviceSpec(**d) for d in fields["devices"])
        return cls(**fields)


@dataclass(frozen=True)
class AttachSpec:
    """What a client process needs to reach its worker. ``mode`` is "remote" or "direct".

    ``addresses``: (host, port) of each device's worker, if the lease spans servers; empty if ``host`` and ``port``
    serve all devices.
    ``secure``: connect only through TLS.
    """

    lease_id: str
    host: str
    port: int
    secret: str
    devices: tuple[DeviceSpec, ...]
    ttl_s: float = 15.0
    mode: str = "remote"
    secure: bool = False
    addresses: tuple[tuple[str, int], ...] = ()

    def parts(self) -> tuple[AttachSpec, ...]:
        """Return one spec for each of the lease's workers, with the devices that it serves."""
        if not self.addresses:
            return (self,)
        served: dict[tuple[str, int], list[DeviceSpec]] = {}
        for address, device in zip(self.addresses, self.devices):
            served.setdefault(address, []).append(device)
        return tuple(
            replace(self, host=host, port=port, devices=tuple(devices), addresses=())
            for (host, port), devices in served.items()
        )

    def part_of(self, index: int) -> AttachSpec | None:
        """Return the part with the worker of the device of that number; None if there is none."""
        return next((p for p in self.parts() if any(d.index == index for d in p.devices)), None)

    def visible(self, text: str | None) -> AttachSpec:
        """Return the spec of the devices that a process with ``CUDA_VISIBLE_DEVICES=text`` sees, numbered anew."""
        shown = visible_devices(self.devices, text)
        return replace(
            self,
            devices=tuple(replace(self.devices[k], index=number) for number, k in enumerate(shown)),
            addresses=tuple(self.addresses[k] for k in shown) if self.addresses else (),
        )

    def to_json(self) -> str:
        """Return the spec as JSON text."""
        fields = asdict(self)
        if not self.addresses:  # an older version may read it
            del fields["addresses"]
        return json.dumps(fields)

    @classmethod
    def read(cls, path: str | None) -> AttachSpec | None:
        """Return the spec in a lease's file; None without a path, or where the lease has been released."""
        if not path:
            return None
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @classmethod
    def from_json(cls, text: str) -> AttachSpec:
        """Return the spec from JSON text. Raises ValueError, KeyError and TypeError for anything else."""
        fields = json.loads(text)
        fields["devices"] = tuple(DeviceSpec(**d) for d in fields["devices"])
        fields["addresses"] = tuple((host, port) for host, port in fields.get("addresses", ()))
        fields.pop("ca", None)  # an earlier version wrote whom to trust
        return cls(**fields)


def visible_devices(devices: Sequence[DeviceSpec], text: str | None) -> tuple[int, ...]:
    """Return the positions of the devices that ``CUDA_VISIBLE_DEVICES=text`` leaves, in its order. None: all.

    As CUDA reads it: numbers, or the beginnings of UUIDs that mean one device; the first wrong one ends the list, and
    a device that is named twice empties it.
    """
    if text is None:
        return tuple(range(len(devices)))
    found: list[int] = []
    for word in (part.strip() for part in text.split(",")):
        number = re.match(r"[+-]?\d+", word)
        if number:
            matching = [k for k in range(len(devices)) if k == int(number[0])]
        else:
            matching = [k for k, d in enumerate(devices) if word and d.uuid.startswith(word)]
        if len(matching) != 1:
            break
        if matching[0] in found:
            return ()
        found += matching
    return tuple(found)


#: A worker's exit codes: why it ended. Any other code means that it died.
EXIT_RELEASED = 0
EXIT_HOLDER_LOST = 10
EXIT_NEVER_ATTACHED = 11
EXIT_FENCED = 12
EXIT_STOPPED = 13
#: The lease goes on with another worker.
EXIT_MOVED = 14
#: The worker could not write its state file, so nothing could find it again.
EXIT_UNRECORDED = 20
#: A kernel of the program failed, which takes the GPU from the worker's process; or the GPU itself failed.
EXIT_KERNEL_FAILED = 21
EXIT_GPU_FAILED = 22
#: The worker could not set up its GPU, so that another one could not either.
EXIT_GPU_UNUSABLE = 23
#: The worker could not be shut in its sandbox, so it served nobody.
EXIT_NOT_SHUT_IN = 24
#: The worker could not be put into its control group, so it served nobody.
EXIT_NOT_BOUND = 25
