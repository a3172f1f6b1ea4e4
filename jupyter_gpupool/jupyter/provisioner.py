"""``gpupool-provisioner``: starts kernels as the local provisioner does, with slices of the pool's GPUs."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_client.provisioning import KernelProvisionerBase, LocalProvisioner
from traitlets import Bool, Dict, Float, Int

from ..pool.errors import InvalidRequest, PoolError
from . import contract, door
from .hub.single_user import at_server, default_wish
from .ports import KeptPorts
from .wishes import FIELDS, Wish, of_notebook, parse, wishes

if TYPE_CHECKING:
    from .kernel_lease import KernelLease

#: Where Jupyter Server says which notebook a kernel is for.
_SESSION = "JPY_SESSION_NAME"


class GPUPoolProvisioner(LocalProvisioner):
    """Lends a kernel the slices that it asks for, from its start to its end, through every restart.

    What it asks for is found, in this order, in what was stored for its id (``PUT …/kernels/{id}``), in
    the notebook's metadata (``gpupool``), and in the kernelspec (``metadata.kernel_provisioner.config``).
    A kernel that asks for nothing is started as ever. One whose slices are not free starts without them and
    has them attached when its turn comes, unless it says ``require``.
    """

    num_gpus = Int(0, help="How many GPUs. 0 (the default): none.").tag(config=True)
    partial = Float(
        None,
        allow_none=True,
        help="Which share of each GPU's memory, above 0 and at most 1. None (the default): all of it, or memory_mib.",
    ).tag(config=True)
    memory_mib = Int(
        None,
        allow_none=True,
        help="How many MiB of each GPU's memory, instead of a share. None (the default): see partial.",
    ).tag(config=True)
    filters = Dict(help='Which GPUs, such as {"name": "V100"}. Empty (the default): any.').tag(config=True)
    spread = Bool(
        False, help="Whether they may be of several servers, where none has room for all."
    ).tag(config=True)
    require = Bool(
        False,
        help="Whether the kernel shall not start without its GPUs. By default it starts, and gets them in its turn.",
    ).tag(config=True)
    grace_s = Float(
        10.0,
        min=0.0,
        help="Seconds that a kernel which died may take to be started again before its GPUs are given back.",
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        # The kernelspec's own words come as arguments: what is wrong with them is for the kernel's user to
        # read at its start, not for whoever happens to make this object.
        written = {k: kwargs.pop(k) for k in list(kwargs) if k not in _OF_JUPYTER}
        self._spec_fault: InvalidRequest | None = None
        try:
            grace_s = written.pop("grace_s", None)
            if grace_s is not None:
                kwargs["grace_s"] = _seconds(grace_s)
            wish = parse(written, "the kernelspec")
            if wish is not None:
                kwargs.update(wish.to_json())
        except InvalidRequest as e:
            self._spec_fault = e
        super().__init__(**kwargs)
        self._lease: KernelLease | None = None
        self._wish: Wish | None = None
        self._notebook = ""
        self._ports = KeptPorts()
        self._preparing = asyncio.Lock()
        self._ends = 0
        self._launched = False

    # -- the kernel's life

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        self._notebook = (kwargs.get("env") or os.environ).get(_SESSION, "")
        ends = self._ends
        try:
            async with self._preparing:  # its user and its restarter may start it again at once
                environment = {} if self._is_gone() else await self._prepare()
            if self._ends != ends or self._is_gone():
                raise RuntimeError("The kernel or its server was shut down while it was about to start")
            kwargs = await super().pre_launch(**kwargs)
            self._keep_ports()
        except BaseException:
            await self._give_back()  # nobody will call cleanup
            raise
        if environment or not at_server():
            for name in contract.ALL:
                kwargs["env"].pop(name, None)  # the server's own are none of the kernel's
        if environment:
            kwargs["env"].update(environment)
            kwargs["cmd"] = _with_magic(kwargs["cmd"])
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        try:
            if self.has_process and await self.poll() is None:
                await self.kill()  # of two that were started at once; nobody would end it any more
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
            info["gpupool"] = {"lease": self._lease.id, "wish": self._lease.wish.to_json()}
        return info

    async def load_provisioner_info(self, provisioner_info: dict) -> None:
        """A lease dies with the process that held it; the next start of the kernel asks for the same again."""
        await super().load_provisioner_info(provisioner_info)
        saved = provisioner_info.get("gpupool")
        if isinstance(saved, dict):
            try:
                self._wish = parse(saved.get("wish"), "the kernel's saved state")
            except InvalidRequest as e:
                self.log.warning("Kernel %s: %s", self.kernel_id, e)

    async def _give_back(self) -> None:
        self._ports.let_go()
        await self._release()

    def _is_gone(self) -> bool:
        """Whether it, or its server, was shut down for good: its restarter may be at it, and nobody would end it."""
        kernels = getattr(self.parent, "parent", None)
        if not isinstance(kernels, MultiKernelManager):
            return False
        return kernels in door.closing or (self._launched and self.kernel_id not in kernels)

    def _keep_ports(self) -> None:
        said = self.connection_info
        if said.get("transport") == "tcp":
            ports = [v for k, v in said.items() if k.endswith("_port") and isinstance(v, int)]
            self._ports.keep(str(said["ip"]), ports)

    # -- its lease

    async def _prepare(self) -> dict[str, str]:
        """The environment that this start of the kernel is to have. Raises KernelRefused."""
        lease = self._lease
        if lease is not None:
            lease.unwatch()
            if not lease.ended:
                await asyncio.to_thread(lease.refresh)
                return lease.environment()
            await self._release()
        try:
            wish = await self._find_wish()
            if wish is None:
                return {}
            self._wish = wish
            return (await self._begin(wish)).environment()
        except PoolError as e:
            raise _refused(e) from None

    async def _find_wish(self) -> Wish | None:
        if self.kernel_id is not None and wishes.knows(self.kernel_id):
            return wishes.take(self.kernel_id)
        if self._wish is not None:
            return self._wish
        if self._notebook.endswith(".ipynb"):
            said, wish = await asyncio.to_thread(of_notebook, self._notebook)
            if said:
                return wish
        if self._spec_fault is not None:
            raise self._spec_fault
        wish = parse({name: getattr(self, name) for name in FIELDS}, "the kernelspec")
        return wish or parse(default_wish(), "what was chosen for this server")

    async def _begin(self, wish: Wish) -> KernelLease:
        from .kernel_lease import KernelLease  # a kernel that asks for nothing does not pay for it

        name = os.path.basename(self._notebook) or f"kernel {str(self.kernel_id)[:8]}"
        label = "".join(c if c.isprintable() else "?" for c in name)[:80]
        lease = self._lease = KernelLease(wish, label, lambda line: self.log.warning("%s", line))
        await asyncio.to_thread(lease.begin)
        return lease

    async def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await asyncio.shield(asyncio.to_thread(lease.release))


#: What the factory hands over besides the kernelspec's configuration.
_OF_JUPYTER = frozenset(KernelProvisionerBase.class_traits()) | {"connection_info"}


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise InvalidRequest(f"the kernelspec: grace_s is {str(value)[:40]!r}, not seconds from 0 up")
    return float(value)


def _with_magic(command: list[str]) -> list[str]:
    """ipykernel's command, if it is one of this Python environment, with %gpupool loaded."""
    import jupyter_gpupool

    flag = "--ext=jupyter_gpupool"
    if not hasattr(jupyter_gpupool, "load_ipython_extension"):
        return command
    if not {"ipykernel_launcher", "ipykernel"} & set(command[1:3]) or flag in command:
        return command
    ours = os.path.dirname(os.path.abspath(command[0])) == os.path.dirname(os.path.abspath(sys.executable))
    return [*command, flag] if ours else command


def _refused(why: PoolError) -> Exception:
    """What JupyterLab shows beneath "Error Starting Kernel", with a status of its own where it can have one."""
    from tornado.web import HTTPError

    class KernelRefused(HTTPError):
        # Where sessions are started, this is all that becomes of it.
        def __str__(self) -> str:
            return str(self.reason)

    line = f"The kernel was not started, for it cannot have the GPU it asks for: {why}"
    line = " ".join(line.split()).encode("ascii", "replace").decode().replace("%", " per cent")
    status = why.status if why.status in (400, 422) else 503
    return KernelRefused(status, line, reason=line)
