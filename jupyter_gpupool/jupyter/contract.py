"""What a kernel's environment says of its lease; docs/architecture.md has the contract."""

from __future__ import annotations

#: The file that describes the lease (``remote.specs.AttachSpec`` as JSON).
LEASE = "GPUPOOL_LEASE"
#: Where that file will be as soon as the lease is granted, and the id to ask the pool for until then.
PENDING = "GPUPOOL_PENDING"
PENDING_LEASE = "GPUPOOL_PENDING_LEASE"
#: Why the kernel has none although it was to have one: a line for its user.
REFUSED = "GPUPOOL_REFUSED"

ALL = (LEASE, PENDING, PENDING_LEASE, REFUSED)
