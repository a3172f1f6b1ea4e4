"""Reads what this machine says of itself, besides its GPUs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from . import vitals
from .readings import ServerReading

T = TypeVar("T")

#: Where CUDA's multi-process service keeps its control pipe unless told otherwise.
_MPS_FOLDER = "/tmp/nvidia-mps"


def read(
    server: str,
    *,
    folders: Sequence[str] = (),
    address: str = "",
    driver_expected: bool = False,
    xids: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> ServerReading:
    """This machine now, under the name ``server``. ``folders``: where the pool writes; ``address``: at which clients
    reach it; ``driver_expected``: the pool has real GPUs here. Takes milliseconds, longer where a driver hangs."""
    driver, gpus = vitals.read(xids)
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
    """The network interface that has that address (a name is resolved; "": the one that leads outside): its name,
    MTU in bytes and speed in Mbit/s. ("", None, None) where that cannot be told."""
    own = _own_address(address)
    addresses = _try(psutil.net_if_addrs) or {}
    stats = _try(psutil.net_if_stats) or {}
    for name, found in addresses.items():
        if any(own == entry.address.partition("%")[0] for entry in found) and name in stats:
            return name, stats[name].mtu or None, stats[name].speed or None
    return "", None, None


def local_address(host: str, port: int) -> str:
    """This machine's address as ``host`` sees it; "" where no way leads there. Sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(where)
            return sock.getsockname()[0].partition("%")[0]
    except (OSError, UnicodeError, IndexError):
        return ""


def mps_runs() -> bool:
    """Whether the control daemon of CUDA's multi-process service runs here."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_FOLDER)
    try:
        return psutil.pid_exists(int((folder / "nvidia-cuda-mps-control.pid").read_text().strip()))
    except (OSError, ValueError):
        return False


def _own_address(address: str) -> str:
    if not address:
        return local_address("192.0.2.1", 9)  # for documentation; the question is which way leads outside
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
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _try(ask: Callable[[], T]) -> T | None:
    """The answer, or None on a machine that has none."""
    try:
        return ask()
    except (OSError, psutil.Error, importlib.metadata.PackageNotFoundError):
        return None
