"""How much a worker may take of its machine, and whether it takes more. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jupyter_gpupool.transport.specs import DeviceSpec

#: What a worker needs whatever its slices are, in MiB: PyTorch, other libraries, compilers of graphs.
BESIDE_SLICES_MIB = 4096
#: What a worker needs for each MiB of its slices: an emulated GPU's memory is host memory, and so is a copy of it that
#: is on its way; of a real GPU's memory, two such copies.
PER_SLICE_MIB = 2
#: No worker may have more than this part of the machine's memory by default, so that no worker takes it all.
MOST_OF_MACHINE = 0.9
#: Threads and processes of one worker: a few for each of at most 256 sessions, and those of libraries.
MAX_TASKS = 4096
#: Open files of one worker: connections, and what libraries open.
MAX_OPEN_FILES = 4096
#: Files in a worker's own directory, and how deep in it they lie.
MAX_FILES, MAX_DEPTH = 20_000, 32


@dataclass(frozen=True)
class Limits:
    """The limits of one worker. In MiB; 0 is no limit.

    ``memory_mib``: host memory of all its processes. ``data_mib``: what each process may allocate, used or not.
    ``disk_mib``: its own directory. ``tasks``: threads and processes. ``weight``: its share of the processors beside
    other workers', 100 for a whole GPU. ``slices_mib``: what its slices have, and so the most that it keeps of them.
    """

    memory_mib: int = 0
    data_mib: int = 0
    disk_mib: int = 0
    tasks: int = MAX_TASKS
    weight: int = 100
    slices_mib: int = 0


@dataclass(frozen=True)
class Taken:
    """What a worker takes at one moment: bytes, and numbers of threads and of files."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    tasks: int = 0
    files: int = 0
    depth: int = 0


def limits_of(
    devices: Sequence[DeviceSpec], machine_mib: int, host_memory_mib: int | None, disk_mib: int
) -> Limits:
    """Return the limits of a worker with these slices on a machine with so much memory.

    ``host_memory_mib``: as it was set; None: what follows from the slices.
    """
    slices_mib = sum(device.limit_mib for device in devices)
    whole_mib = sum(device.total_mib for device in devices)
    memory_mib = host_memory_mib
    if memory_mib is None:
        memory_mib = min(
            PER_SLICE_MIB * slices_mib + BESIDE_SLICES_MIB, max(1, int(machine_mib * MOST_OF_MACHINE))
        )
    # What a process allocates and never touches takes no memory, so that without a setting of its own this limit
    # leaves room for every size that the slices may get. The driver of a real GPU reserves as it likes.
    data_mib = 0
    if all(device.emulated for device in devices):
        follows_mib = PER_SLICE_MIB * whole_mib + BESIDE_SLICES_MIB
        data_mib = follows_mib if host_memory_mib is None else host_memory_mib
    share = sum(device.limit_mib / device.total_mib for device in devices)
    weight = min(10_000, max(1, round(100 * share)))
    return Limits(memory_mib, data_mib, disk_mib, weight=weight, slices_mib=slices_mib)


def excess(limits: Limits, taken: Taken) -> str:
    """Return why a worker that takes so much is ended, in words for its user; empty if it keeps to its limits."""
    if limits.memory_mib and taken.memory_bytes > limits.memory_mib << 20:
        return out_of_memory(limits)
    if taken.tasks > limits.tasks:
        return f"its worker had {taken.tasks} threads and processes, where {limits.tasks} are allowed"
    if limits.disk_mib and taken.disk_bytes > limits.disk_mib << 20:
        return (
            f"its worker had written more than the {limits.disk_mib} MiB that it may have on the GPU server's disk "
            f"(worker_disk_mib)"
        )
    if limits.disk_mib and (taken.files > MAX_FILES or taken.depth > MAX_DEPTH):
        return f"its worker had over {MAX_FILES} files on the GPU server's disk, or deeper than {MAX_DEPTH} folders"
    return ""


def out_of_memory(limits: Limits) -> str:
    """Return why a worker was ended that needed more host memory than it may have."""
    return (
        f"its worker needed more than the {limits.memory_mib} MiB of the GPU server's host memory that it may have "
        f"(host_memory_mib)"
    )


def machine_out_of_memory() -> str:
    """Return why a worker was ended that kept to its limit, while all together needed more than there is."""
    return "the GPU server's host memory was used up, and its worker was ended for that, which kept to what it may have"
