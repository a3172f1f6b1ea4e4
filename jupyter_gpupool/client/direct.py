"""Direct connections: a process uses GPUs of its own machine by itself, without a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from jupyter_gpupool.core.errors import InvalidRequest
from jupyter_gpupool.core.models import Lease
from jupyter_gpupool.transport.specs import AttachSpec

#: How a process uses its slices: through the GPU server's worker (remote), as GPUs of its own machine (direct), or
#: direct where that is possible and else remote (auto).
Connection = Literal["auto", "remote", "direct"]
CONNECTIONS: tuple[str, ...] = get_args(Connection)


def choose_connection(wanted: str, lease: Lease) -> str:
    """Return "direct" where ``wanted`` allows it and every slice is of a GPU of this machine, else "remote".

    Raises InvalidRequest where "direct" is wanted and not possible.
    """
    if wanted == "remote":
        return "remote"
    emulated = any(piece.emulated for piece in lease.slices)
    if not emulated and {piece.gpu_uuid for piece in lease.slices} <= local_uuids():
        return "direct"
    if wanted == "direct":
        why = "they are emulated" if emulated else "they are in another machine"
        raise InvalidRequest(
            f"the granted GPUs cannot be attached directly because {why}; use a remote connection"
        )
    return "remote"


def refuse_direct(pool: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if this machine has none of the pool's real GPUs. ``pool``: the answer of ``GET pool``."""
    gpus = [gpu for server in pool["servers"] for gpu in server["gpus"]]
    if gpus and all(gpu["emulated"] for gpu in gpus):
        raise InvalidRequest(
            "emulated GPUs cannot be attached directly, and the pool has no others; use a remote connection"
        )
    if not local_uuids() & {gpu["uuid"] for gpu in gpus}:
        raise InvalidRequest("none of the pool's GPUs is in this machine; use a remote connection")


def visible_devices(spec: AttachSpec) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES for a direct connection."""
    return ",".join(device.uuid for device in spec.devices)


def local_uuids() -> set[str]:
    """Return the uuids of the GPUs that NVML finds in this machine."""
    from jupyter_gpupool.gpus.nvml import nvml_gpus  # most commands never need it

    return {gpu.uuid for gpu in nvml_gpus("localhost")}
