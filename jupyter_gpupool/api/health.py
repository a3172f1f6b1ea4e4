"""Whether a pool is well: checks by name, each with a figure or with what to do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..pool.errors import PoolError
from ..pool.interfaces import Engine


@dataclass(frozen=True)
class Check:
    """One health check: what was looked at, whether it is well, and a figure or what to do."""

    name: str
    ok: bool
    detail: str


async def checks(
    read_ledger: Callable[[], Awaitable[Any]], engine: Engine, ledger_file: Path | None
) -> list[Check]:
    """Of a pool that runs; ``read_ledger`` raises PoolError where the ledger cannot be read."""
    started = time.perf_counter()
    try:
        await read_ledger()
        ledger = Check("ledger", True, f"answers in {(time.perf_counter() - started) * 1000:.1f} ms")
    except PoolError as e:
        ledger = Check("ledger", False, str(e))
    servers = await engine.servers()
    gpus = [gpu for server in servers for gpu in server.gpus]
    emulated = sum(gpu.emulated for gpu in gpus)
    sick = [gpu.uuid for gpu in gpus if not gpu.healthy]
    detail = f"{len(gpus)} found" + (f", {emulated} of them emulated" if emulated else "")
    found = [
        ledger,
        Check("gpus", bool(gpus) and not sick, detail + (f", unhealthy: {sick}" if sick else "")),
        _engine(engine),
    ]
    if ledger_file is not None:
        free = shutil.disk_usage(ledger_file.parent).free
        found.append(Check("disk", free > 64 << 20, f"{free >> 20} MiB free for the ledger (64 needed)"))
    memory = psutil.virtual_memory()
    found.append(Check("memory", memory.percent < 97, f"{memory.available >> 20} MiB available"))
    return found


def _engine(engine: Engine) -> Check:
    if engine.failure:
        return Check("engine", False, engine.failure)
    detail = "ready to start workers" if engine.warm else "starting: PyTorch is being imported"
    return Check("engine", True, detail)
