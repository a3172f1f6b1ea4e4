"""What only one worker may know: the digest of its lease's secret, and its own key.

They go to it in files in memory, which the process that forks workers passes on without reading them. Otherwise each
worker would inherit what that process has read for the workers before it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from jupyter_gpupool.transport.specs import WorkerSpec

#: The descriptors of a worker: of the digest, and of its certificate and key if it speaks TLS.
MAX_DESCRIPTORS = 2


def without(spec: WorkerSpec) -> WorkerSpec:
    """Return the spec as everybody may know it."""
    return replace(spec, secret_sha256="")


def hand_over(spec: WorkerSpec, certificate: bytes = b"") -> list[int]:
    """Return the descriptors for a worker, which are the caller's to close. Raises OSError.

    ``certificate``: the worker's own and its key, in PEM; without it the worker speaks no TLS.
    """
    descriptors: list[int] = []
    try:
        for content in (spec.secret_sha256.encode(), certificate):
            if content:
                descriptors.append(os.memfd_create("worker", os.MFD_CLOEXEC))
                os.write(descriptors[-1], content)
    except OSError:
        close(descriptors)
        raise
    return descriptors


def take(spec: WorkerSpec, descriptors: Sequence[int]) -> WorkerSpec:
    """Return a worker's whole spec, from these descriptors, which it keeps open. Raises OSError."""
    if not descriptors:
        return spec
    digest = os.pread(descriptors[0], 1024, 0).decode()
    own = f"/proc/self/fd/{descriptors[1]}" if speaks_tls(descriptors) else ""
    return replace(spec, secret_sha256=digest, certfile=own, keyfile=own)


def speaks_tls(descriptors: Sequence[int]) -> bool:
    """Return whether the worker that is given these descriptors has a certificate."""
    return len(descriptors) == MAX_DESCRIPTORS


def close(descriptors: Sequence[int]) -> None:
    """Close them."""
    for descriptor in descriptors:
        os.close(descriptor)
