"""Emulated GPUs: their memory is limited as on a real one, and the CPU does their work."""

from __future__ import annotations

import uuid

from jupyter_gpupool.core.models import GPU

#: Namespace of the uuids; never change it, because every emulated GPU would get a new uuid.
_NAMESPACE = uuid.UUID("5b0c3a52-6f0e-4d55-9d3b-5d7a4f6f6c11")

#: A widely known card; 80 % of its memory are 26008 MiB. The name marks it as emulated.
DEFAULT_NAME = "Tesla V100-PCIE-32GB (emulated)"
DEFAULT_MEMORY_MIB = 32510
DEFAULT_COUNT = 2


def emulated_gpus(
    server: str,
    count: int = DEFAULT_COUNT,
    name: str = DEFAULT_NAME,
    memory_mib: int = DEFAULT_MEMORY_MIB,
) -> tuple[GPU, ...]:
    """Return ``count`` emulated GPUs of ``memory_mib`` MiB each, with the same uuids every time.

    "(emulated)" is appended to a name without it. Raises ValueError if ``count`` is
    negative or ``memory_mib`` is less than 1.
    """
    if count < 0:
        raise ValueError(f"the number of emulated GPUs must not be negative, not {count}")
    if memory_mib < 1:
        raise ValueError(f"an emulated GPU needs at least 1 MiB, not {memory_mib}")
    if "(emulated)" not in name:
        name = f"{name} (emulated)"
    return tuple(
        GPU(
            uuid=f"GPU-{uuid.uuid5(_NAMESPACE, f'{server}/{index}')}",
            server=server,
            index=index,
            name=name,
            memory_mib=memory_mib,
            emulated=True,
        )
        for index in range(count)
    )
