"""``gpupool-provisioner``: starts kernels as the local provisioner does, with GPU slices."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Bool, Dict, Float, Int

from jupyter_gpupool.client.lease_environment import remove_commands
from jupyter_gpupool.core.environment import KERNEL_VARIABLES
from jupyter_gpupool.core.errors import InvalidRequest, PoolError
from jupyter_gpupool.hub.single_user import at_server, default_request

from . import process_state
from .kernel_gpu_requests import FIELDS, GPURequest, of_notebook, parse, pending_requests
from .port_reservation import ReservedPorts

if TYPE_CHECKING:
    from .kernel_lease import KernelLease

#: The variable in which Jupyter Server names a kernel's notebook.
_SESSION = "JPY_SESSION_NAME"


class GPUPoolProvisioner(LocalProvisioner):
    """Holds a kernel's GPU slices from its start to its end, through every restart.

    The request is looked up in this order: stored for the kernel's id (``PUT …/kernels/{id}``), in the notebook's
    metadata (``gpupool``), and in the kernelspec (``metadata.kernel_provisioner.config``).
    A kernel without a request starts as usual. If its slices are not free, a kernel starts without them and they are
    attached when they are granted; with ``require``, it does not start.
    """

    num_gpus = Int(0, help="Number of GPU slices. 0 (the default): none.").tag(config=True)
    partial = Float(
        None,
        allow_none=True,
        help="Share of each GPU's memory, above 0 and at most 1. None (the default): all of it, or memory_mib.",
    ).tag(config=True)
    memory_mib = Int(
        None,
        allow_none=True,
        help="Memory of each GPU slice in MiB, instead of a share. None (the default): see partial.",
    ).tag(config=True)
    filters = Dict(help='Which GPUs, for example {"name": "V100"}. Empty (the default): any.').tag(
        config=True
    )
    spread = Bool(False, help="Whether slices may be on several servers if none has room for all.").tag(
        config=True
    )
    never_park = Bool(
        False, help="Whether the GPUs are kept while the kernel is idle, even if others wait for them."
    ).tag(config=True)
    require = Bool(
        False,
        help="Whether the kernel must not start without its GPUs. By default it starts, and they are attached later.",
    ).tag(config=True)
    grace_s = Float(
        10.0,
        min=0.0,
        help="How long the GPUs of a kernel that died are kept for its restart, in seconds.",
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        # The kernelspec's configuration comes as arguments. Errors in it are raised when the kernel starts, where the
        # kernel's user sees them, and not here, where only the code that creates this object would.
        written = {k: kwargs.pop(k) for k in list(kwargs) if k not in _OF_JUPYTER}
        self._spec_fault: InvalidRequest | None = None
        try:
            grace_s = written.pop("grace_s", None)
            if grace_s is not None:
                kwargs["grace_s"] = _seconds(grace_s)
            request = parse(written, "the kernelspec")
            if request is not None:
                kwargs.update(request.to_json())
        except InvalidRequest as e:
            self._spec_fault = e
        super().__init__(**kwargs)
        self._lease: KernelLease | None = None
        self._gpu_request: GPURequest | None = None
        self._notebook = ""
        self._ports = ReservedPorts()
        self._preparing = asyncio.Lock()
        self._ends = 0
        self._launched = False

    # -- the kernel's life

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        self._notebook = (kwargs.get("env") or os.environ).get(_SESSION, "")
        ends = self._ends
        try:
            async with self._preparing:  # its user and its restarter may restart it at the same time
                lease = None if self._is_gone() else await self._prepare()
            if self._ends != ends or self._is_gone():
                raise RuntimeError(
                    "The kernel did not start, because it or its server was shut down meanwhile"
                )
            kwargs = await super().pre_launch(**kwargs)
            self._reserve_ports()
        except BaseException:
            await self._give_back()  # Jupyter does not call cleanup then
            raise
        if lease is not None or not at_server():
            for name in KERNEL_VARIABLES:
                kwargs["env"].pop(name, None)  # those of the server are not for the kernel
            remove_commands(kwargs["env"])
        if lease is not None:
            kwargs["env"].update(lease.environment(kwargs["env"]))
            kwargs["cmd"] = _with_magic(kwargs["cmd"])
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        try:
            if self.has_process and await self.poll() is None:
                await self.kill()  # two starts at once: nobody would end the first
                await self.wait()
            connection = await super().launch_kernel(cmd, **kwargs)
        except BaseException:
            await self._give_back()  # as above
            raise
        self._launched = True
        if self._lease is not None and self.pid is not None:
            self._lease.watch(self.pid, self.grace_s)
        return connection

    async def cleanup(self, restart: bool = False) -> None:
        await super().cleanup(restart=restart)
        if not restart:
            self._ends += 1
            await self._give_back()

    async def get_provisioner_info(self) -> dict[str, Any]:
        info = await super().get_provisioner_info()
        if self._lease is not None:
            info["gpupool"] = {"lease": self._lease.id, "wish": self._lease.gpu_request.to_json()}
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Remember the kernel's request. Its lease ended with the process that held it."""
        await super().load_provisioner_info(provisioner_info)
        saved = provisioner_info.get("gpupool")
        if isinstance(saved, dict):
            try:
                self._gpu_request = parse(saved.get("wish"), "the kernel's saved state")
            except InvalidRequest as e:
                self.log.warning("Kernel %s: %s", self.kernel_id, e)

    async def _give_back(self) -> None:
        self._ports.release()
        await self._release()

    def _is_gone(self) -> bool:
        """Return whether the kernel or its server was shut down. Nobody would end a kernel that is restarted then."""
        kernels = getattr(self.parent, "parent", None)
        if not isinstance(kernels, MultiKernelManager):
            return False
        return kernels in process_state.closing or (self._launched and self.kernel_id not in kernels)

    def _reserve_ports(self) -> None:
        said = self.connection_info
        if said.get("transport") == "tcp":
            ports = [v for k, v in said.items() if k.endswith("_port") and isinstance(v, int)]
            self._ports.reserve(str(said["ip"]), ports)

    # -- its lease

    async def _prepare(self) -> KernelLease | None:
        """Return the lease for this start of the kernel. Raises KernelRefused."""
        lease = self._lease
        if lease is not None:
            lease.unwatch()
            if not lease.ended:
                await asyncio.to_thread(lease.refresh)
                return lease
            await self._release()
        try:
            request = await self._find_request()
            if request is None:
                return None
            self._gpu_request = request
            return await self._begin(request)
        except PoolError as e:
            raise _refused(e) from None

    async def _find_request(self) -> GPURequest | None:
        if self.kernel_id is not None and pending_requests.has(self.kernel_id):
            return pending_requests.take(self.kernel_id)
        if self._gpu_request is not None:
            return self._gpu_request
        if self._notebook.endswith(".ipynb"):
            said, request = await asyncio.to_thread(of_notebook, self._notebook)
            if said:
                return request
        if self._spec_fault is not None:
            raise self._spec_fault
        request = parse({name: getattr(self, name) for name in FIELDS}, "the kernelspec")
        return request or parse(default_request(), "what was chosen for this server")

    async def _begin(self, request: GPURequest) -> KernelLease:
        from .kernel_lease import KernelLease  # imported late: a kernel without a request does not need it

        name = os.path.basename(self._notebook) or f"kernel {str(self.kernel_id)[:8]}"
        label = "".join(c if c.isprintable() else "?" for c in name)[:80]
        lease = self._lease = KernelLease(request, label, lambda line: self.log.warning("%s", line))
        await asyncio.to_thread(lease.begin)
        return lease

    async def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await asyncio.shield(asyncio.to_thread(lease.release))


#: The arguments that the factory passes besides the kernelspec's configuration.
_OF_JUPYTER = frozenset(KernelProvisionerBase.class_traits()) | {"connection_info"}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise InvalidRequest(f"the kernelspec: grace_s is {str(value)[:40]!r}, but must be seconds from 0 up")
    return float(value)


def _with_magic(command: list[str]) -> list[str]:
    """Return the command with %gpupool loaded, if it starts an ipykernel of this Python environment."""
    import jupyter_gpupool

    flag = "--ext=jupyter_gpupool"
    if not hasattr(jupyter_gpupool, "load_ipython_extension"):
        return command
    if not {"ipykernel_launcher", "ipykernel"} & set(command[1:3]) or flag in command:
        return command
    ours = os.path.dirname(os.path.abspath(command[0])) == os.path.dirname(os.path.abspath(sys.executable))
    return [*command, flag] if ours else command


def _refused(why: PoolError) -> Exception:
    """Return the error that JupyterLab shows beneath "Error Starting Kernel"."""
    from tornado.web import HTTPError

    class KernelRefused(HTTPError):
        # The call that starts sessions shows only this text.
        def __str__(self) -> str:
            return str(self.reason)

    line = f"Kernel not started: the requested GPUs are not available. {why}"
    line = " ".join(line.split()).encode("ascii", "replace").decode().replace("%", " per cent")
    status = why.status if why.status in (400, 422) else 503
    return KernelRefused(status, line, reason=line)
