"""GPUs that exist only in name: their share of memory is counted, their work is done by the CPU."""

from __future__ import annotations

import uuid

from ..pool.models import GPU

#: Namespace of the uuids below; never change it, or every emulated GPU becomes another one.
_NAMESPACE = uuid.UUID("5b0c3a52-6f0e-4d55-9d3b-5d7a4f6f6c11")

#: A card that many know; 80 % of its memory are 26008 MiB. The name says that it is emulated.
DEFAULT_NAME = "Tesla V100-PCIE-32GB (emulated)"
DEFAULT_MEMORY_MIB = 32510
DEFAULT_COUNT = 2


def emulated_gpus(
    server: str,
    count: int = DEFAULT_COUNT,
    name: str = DEFAULT_NAME,
    memory_mib: int = DEFAULT_MEMORY_MIB,
) -> tuple[GPU, ...]:
    """``count`` emulated GPUs of ``memory_mib`` MiB each, with the same uuids every time.

    A name that does not say "(emulated)" is completed with it. Raises ValueError if ``count`` is
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
