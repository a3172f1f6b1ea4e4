"""Read the health of this machine, and of its GPUs with nvml_reader."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import psutil

from jupyter_gpupool.core.readings import ServerReading
from jupyter_gpupool.gpus.mps import mps_runs

from . import nvml_reader

T = TypeVar("T")


def read(
    server: str,
    *,
    folders: Sequence[str] = (),
    address: str = "",
    driver_expected: bool = False,
    xids: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> ServerReading:
    """Read this machine now, under the server name ``server``.

    ``folders``: folders that the pool writes to; ``address``: this machine's address for clients;
    ``driver_expected``: the pool has real GPUs here; ``xids``: driver errors by uuid of the GPU.
    Takes milliseconds, or longer if a driver hangs.
    """
    driver, gpus = nvml_reader.read(xids)
    memory = _try(psutil.virtual_memory)
    interface, mtu, link = interface_of(address)
    return ServerReading(
        server=server,
        at=time.time(),
        driver=driver.version,
        cuda=driver.cuda,
        no_driver=driver.missing,
        driver_expected=driver_expected or driver.installed,
        gpus=gpus,
        memory_mib=None if memory is None else memory.total >> 20,
        available_mib=None if memory is None else memory.available >> 20,
        free_mib=_free(folders),
        open_files=_try(lambda: len(os.listdir("/proc/self/fd"))),
        open_files_limit=_open_files_limit(),
        interface=interface,
        mtu=mtu,
        link_mbit=link,
        mps=mps_runs() if gpus else None,
        torch=_try(lambda: importlib.metadata.version("torch")),
    )


def interface_of(address: str) -> tuple[str, int | None, int | None]:
    """Return name, MTU in bytes and speed in Mbit/s of the network interface with that address.

    A host name is resolved; "" means the interface of the default route. ("", None, None) if there is none.
    """
    own = _own_address(address)
    addresses = _try(psutil.net_if_addrs) or {}
    stats = _try(psutil.net_if_stats) or {}
    for name, found in addresses.items():
        if any(own == entry.address.partition("%")[0] for entry in found) and name in stats:
            return name, stats[name].mtu or None, stats[name].speed or None
    return "", None, None


def local_address(host: str, port: int) -> str:
    """Return this machine's address towards ``host``; "" if there is no route. Sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(where)
            return str(sock.getsockname()[0]).partition("%")[0]
    except (OSError, UnicodeError, IndexError):
        return ""


def _own_address(address: str) -> str:
    if not address:
        return local_address("192.0.2.1", 9)  # an address for documentation: finds the default route
    try:
        return str(socket.getaddrinfo(address, None)[0][4][0]).partition("%")[0]
    except (OSError, UnicodeError, IndexError):
        return ""


def _free(folders: Sequence[str]) -> dict[str, int]:
    found = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            found[folder] = shutil.disk_usage(folder).free >> 20
    return found


def _open_files_limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _try(ask: Callable[[], T]) -> T | None:
    """Return the result; None if this machine does not provide it."""
    try:
        return ask()
    except (OSError, psutil.Error, importlib.metadata.PackageNotFoundError):
        return None
