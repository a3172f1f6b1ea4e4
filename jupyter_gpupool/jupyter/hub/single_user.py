"""In a single-user server: takes hold of the lease that the hub got for it, for all of its kernels."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory

from ... import holder
from ...pool.errors import LeaseEnded, PoolError
from ...remote.specs import AttachSpec
from ..contract import LEASE, REFUSED
from .options import Choice

#: "server" or "kernel", where a hub started this server with GPUs of its pool.
MODE = "GPUPOOL_HUB_MODE"


class HubServer:
    """What the hub chose for this server. ``tell`` is given lines for the log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._hold: holder.Hold | None = None
        self._config: Path | None = None

    @property
    def wanted(self) -> bool:
        return bool(os.environ.get(MODE))

    async def start(self) -> None:
        """Kernels and terminals that start from here on have the server's GPUs, or are told why not."""
        mode = os.environ.get(MODE)
        if mode == "kernel":
            # A kernel that says nothing itself is given what was chosen.
            KernelProvisionerFactory.instance().default_provisioner_name = "gpupool-provisioner"
        elif mode == "server":
            try:
                await asyncio.to_thread(self._take)
            except (PoolError, OSError) as e:
                self._tell(f"This server has no GPUs: {e}")
                os.environ[REFUSED] = " ".join(str(e).split())

    async def stop(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            await asyncio.to_thread(hold.release)
        if self._config is not None:
            self._config.unlink(missing_ok=True)
            os.environ.pop(LEASE, None)

    def _take(self) -> None:
        client, _ = holder.find_pool(patience_s=30.0)
        try:
            lease, secret = client.my_server()
            if lease is None or lease.state.ended or lease.worker is None:
                why = lease.reason if lease is not None else "none was lent to it"
                raise LeaseEnded(f"its lease has ended: {why}; stop the server, and start it again")
            spec = holder.attach_spec(client, lease, secret, holder.attach_mode(attach(), lease))
            self._hold = holder.Hold(client, lease, spec, on_lost=self._lost, on_resized=self._write)
            client.hold_my_server()
        except BaseException:
            if self._hold is None:
                client.close()
            raise
        handle, name = tempfile.mkstemp(prefix="gpupool-server-")
        os.close(handle)
        self._config = Path(name)
        self._write(spec)
        os.environ[LEASE] = name
        if spec.mode == "direct":
            os.environ["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(spec)

    def _write(self, spec: AttachSpec) -> None:
        if self._config is not None:
            holder.write_config(self._config, spec)

    def _lost(self, reason: str) -> None:
        self._tell(f"The GPUs of this server are gone: {reason}; stop it, and start it again")
        os.environ.pop(LEASE, None)
        os.environ[REFUSED] = " ".join(reason.split())


def attach() -> str:
    """How the hub wants GPUs to be used: "auto" or "remote"."""
    return os.environ.get("GPUPOOL_HUB_ATTACH", "auto")


def at_server() -> bool:
    """Whether this server's GPUs are all of its kernels'."""
    return os.environ.get(MODE) == "server"


def default_wish() -> Any:
    """What a kernel is given that says nothing, as a wish's fields; None without a hub, or in the other mode."""
    if os.environ.get(MODE) != "kernel":
        return None
    try:
        return Choice.from_text(os.environ["GPUPOOL_HUB_DEFAULT"]).wish()
    except (KeyError, ValueError):
        return None
