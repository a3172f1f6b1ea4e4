"""In a single-user server: holds the lease that the hub acquired for the server and all of its kernels."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory

from jupyter_gpupool.client import direct, file_cleaner, lease_holder, pool_finder, requests
from jupyter_gpupool.client.lease_environment import lease_variables, remove_commands
from jupyter_gpupool.core.environment import LEASE, REFUSED
from jupyter_gpupool.core.errors import LeaseEnded, PoolError
from jupyter_gpupool.transport.specs import AttachSpec

from .options import GPUOptions

#: "server" or "kernel", if a hub started this server with GPUs of its pool.
MODE = "GPUPOOL_HUB_MODE"


class HubServer:
    """Holds this server's lease. ``tell`` is called with lines for the log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._hold: lease_holder.LeaseHolder | None = None
        self._config: Path | None = None

    @property
    def wanted(self) -> bool:
        """Whether a hub started this server with GPUs."""
        return bool(os.environ.get(MODE))

    async def start(self) -> None:
        """Attach the server's GPUs for the kernels and terminals that start later, or record why there are none."""
        mode = os.environ.get(MODE)
        if mode == "kernel":
            # A kernel that requests nothing itself is given what was chosen on the spawn page.
            KernelProvisionerFactory.instance().default_provisioner_name = "gpupool-provisioner"
        elif mode == "server":
            try:
                await asyncio.to_thread(self._take)
            except (PoolError, OSError) as e:
                self._tell(f"This server has no GPUs: {e}")
                os.environ[REFUSED] = " ".join(str(e).split())

    async def stop(self) -> None:
        """Release the lease."""
        hold, self._hold = self._hold, None
        if hold is not None:
            await asyncio.to_thread(hold.release)
        if self._config is not None:
            self._config.unlink(missing_ok=True)
            file_cleaner.forget(self._config)
            os.environ.pop(LEASE, None)
            remove_commands(os.environ)

    def _take(self) -> None:
        client, _ = pool_finder.find_pool(patience_s=30.0)
        try:
            lease, secret = client.my_server()
            if lease is None or lease.state.ended or lease.worker is None:
                why = lease.reason if lease is not None else "this server has none"
                raise LeaseEnded(f"its lease has ended: {why}; stop the server and start it again")
            spec = requests.attach_spec(client, lease, secret, direct.choose_connection(attach(), lease))
            self._hold = lease_holder.LeaseHolder(
                client, lease, spec, on_lost=self._lost, on_resized=self._write
            )
            client.hold_my_server()
        except BaseException:
            if self._hold is None:
                client.close()
            raise
        handle, name = tempfile.mkstemp(prefix="gpupool-server-")
        os.close(handle)
        self._config = Path(name)
        file_cleaner.remove_at_end(self._config)
        self._write(spec)
        os.environ.update(lease_variables(spec, name, os.environ))

    def _write(self, spec: AttachSpec) -> None:
        if self._config is not None:
            lease_holder.write_config(self._config, spec)

    def _lost(self, reason: str) -> None:
        self._tell(f"This server has lost its GPUs: {reason}; stop it and start it again")
        os.environ.pop(LEASE, None)
        remove_commands(os.environ)
        os.environ[REFUSED] = " ".join(reason.split())


def attach() -> str:
    """Return how the hub's configuration attaches GPUs: "auto" or "remote"."""
    return os.environ.get("GPUPOOL_HUB_ATTACH", "auto")


def at_server() -> bool:
    """Return whether all kernels of this server share the server's GPUs."""
    return os.environ.get(MODE) == "server"


def default_request() -> Any:
    """Return the request of a kernel that makes none itself; None without a hub, or in mode "server"."""
    if os.environ.get(MODE) != "kernel":
        return None
    try:
        return GPUOptions.from_text(os.environ["GPUPOOL_HUB_DEFAULT"]).request_fields()
    except (KeyError, ValueError):
        return None
