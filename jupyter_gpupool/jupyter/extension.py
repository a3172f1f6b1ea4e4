"""The Jupyter Server extension: wiring only."""

from __future__ import annotations

from typing import cast

from jupyter_server.auth.identity import IdentityProvider, LegacyIdentityProvider, PasswordIdentityProvider
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from traitlets import Instance, default

from ..api.handlers import jupyter_handlers
from ..api.service import PoolService
from ..engines.local import LocalEngine
from ..engines.ray.engine import RayEngine
from ..pool.errors import PoolError
from . import door
from .administration import administrative_handlers
from .events import LeaseEvents
from .handlers import kernel_handlers
from .hub.single_user import HubServer
from .metrics import PoolMetrics
from .provisioner import GPUPoolProvisioner
from .relay import EventsWherever
from .user_pool import GPUPool

#: These let one user in, and make up a new name for every browser.
_NAMELESS = (IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider)


class GPUPoolExtension(ExtensionApp):
    """Hosts the pool of the user who runs this Jupyter server, or joins another one, and serves it to JupyterLab."""

    name = "jupyter_gpupool"
    description = "Attach slices of pooled GPUs to notebooks."
    extension_url = "/lab"
    load_other_extensions = True
    classes = [GPUPool, PoolService, LocalEngine, RayEngine, GPUPoolProvisioner]

    pool = Instance(GPUPool)
    _hub_server = Instance(HubServer)
    _metrics: PoolMetrics | None = None

    @default("pool")
    def _default_pool(self) -> GPUPool:
        assert self.serverapp is not None
        return GPUPool(parent=self, nameless=type(self.serverapp.identity_provider) in _NAMELESS)

    @default("_hub_server")
    def _default_hub_server(self) -> HubServer:
        return HubServer(lambda line: self.log.warning("%s", line))

    def initialize_handlers(self) -> None:
        # It answers the calls that the handlers make of a service.
        service = cast(PoolService, self.pool)
        self.handlers.extend(
            kernel_handlers(service)
            + administrative_handlers(service)
            + jupyter_handlers(service, EventsWherever)
        )

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        try:
            await self.pool.start()
        except PoolError as e:
            # The server is of use without GPUs, and the panel says the same line.
            self.log.warning("The GPU pool is not available: %s", e)
        await self._hub_server.start()
        self._metrics = PoolMetrics(self.pool)
        self.pool.listen(self._metrics.changed)
        if serverapp.event_logger is not None:
            self.pool.listen(LeaseEvents(serverapp.event_logger))

    async def stop_extension(self) -> None:
        if self.serverapp is not None:
            door.closing.add(self.serverapp.kernel_manager)
        if self._metrics is not None:
            await self._metrics.stop()
        await self._hub_server.stop()
        await self.pool.stop()
