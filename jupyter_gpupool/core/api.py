"""What both ends of the pool's HTTP interface agree on."""

from __future__ import annotations

#: Every path of the interface begins so.
PREFIX = "/gpupool/api/v1"

#: The longest answer to ``GET audit``, in entries.
MAX_AUDIT_ENTRIES = 1000
