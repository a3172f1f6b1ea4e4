"""The Jupyter Server extension. It only connects the other modules."""

from __future__ import annotations

from jupyter_server.auth.identity import IdentityProvider, LegacyIdentityProvider, PasswordIdentityProvider
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from traitlets import Instance, default

from jupyter_gpupool.core.errors import PoolError
from jupyter_gpupool.engines.local.engine import LocalEngine
from jupyter_gpupool.engines.ray.engine import RayEngine
from jupyter_gpupool.hub.single_user import HubServer
from jupyter_gpupool.server.http.handlers import jupyter_handlers
from jupyter_gpupool.server.service.service import PoolService

from . import process_state
from .admin_proxy import administrative_handlers
from .event_relay import RelayedEvents
from .kernel_handlers import kernel_handlers
from .lease_events import LeaseEvents
from .metrics import PoolMetrics
from .pool_backend import GPUPool
from .provisioner import GPUPoolProvisioner

#: Identity providers that admit one user and invent a new name for every browser.
_SINGLE_USER = (IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider)


class GPUPoolExtension(ExtensionApp):
    """Hosts the pool of the user who runs this Jupyter server, or joins another pool, and serves it to JupyterLab."""

    name = "jupyter_gpupool"
    description = "Attach GPU slices to notebooks."
    extension_url = "/lab"
    load_other_extensions = True
    classes = [GPUPool, PoolService, LocalEngine, RayEngine, GPUPoolProvisioner]

    pool = Instance(GPUPool)
    _hub_server = Instance(HubServer)
    _metrics: PoolMetrics | None = None

    @default("pool")
    def _default_pool(self) -> GPUPool:
        assert self.serverapp is not None
        return GPUPool(parent=self, single_user=type(self.serverapp.identity_provider) in _SINGLE_USER)

    @default("_hub_server")
    def _default_hub_server(self) -> HubServer:
        return HubServer(lambda line: self.log.warning("%s", line))

    def initialize_handlers(self) -> None:
        """Add the handlers of the pool's calls."""
        self.handlers.extend(
            kernel_handlers(self.pool)
            + administrative_handlers(self.pool)
            + jupyter_handlers(self.pool, RelayedEvents)
        )

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        try:
            await self.pool.start()
        except PoolError as e:
            # The server is useful without GPUs, too. The panel shows the same message.
            self.log.warning("The GPU pool is not available: %s", e)
        await self._hub_server.start()
        self._metrics = PoolMetrics(self.pool)
        self.pool.listen(self._metrics.changed)
        if serverapp.event_logger is not None:
            self.pool.listen(LeaseEvents(serverapp.event_logger))

    async def stop_extension(self) -> None:
        """End the pool, if it is hosted here."""
        if self.serverapp is not None:
            process_state.closing.add(self.serverapp.kernel_manager)
        if self._metrics is not None:
            await self._metrics.stop()
        await self._hub_server.stop()
        await self.pool.stop()
