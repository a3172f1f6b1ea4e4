"""``gpupool-provisioner``: starts kernels as the local provisioner does, with slices of the pool's GPUs."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import LocalProvisioner
from tornado.web import HTTPError
from traitlets import Bool, Dict, Float, Int

from ..pool.errors import InvalidRequest, PoolError
from .kernel_lease import LEASE, PENDING, PENDING_LEASE, REFUSED, KernelLease
from .wishes import Wish, of_notebook, parse, wishes

#: Where Jupyter Server says which notebook a kernel is for.
_SESSION = "JPY_SESSION_NAME"


class GPUPoolProvisioner(LocalProvisioner):
    """Lends a kernel the slices that it asks for, from its start to its end, through every restart.

    What it asks for is found, in this order, in what was stored for its id (``PUT …/kernels/{id}``), in
    the notebook's metadata (``gpupool``), and in the kernelspec (``metadata.kernel_provisioner.config``).
    A kernel that asks for nothing is started as ever. One whose slices are not free starts without them and
    has them attached when its turn comes, unless it says ``require``.
    """

    num_gpus = Int(0, help="How many GPUs. 0 (the default): none.", config=True)
    partial = Float(
        None,
        allow_none=True,
        help="Which share of each GPU's memory, above 0 and at most 1. None (the default): all of it, or memory_mib.",
        config=True,
    )
    memory_mib = Int(
        None,
        allow_none=True,
        help="How many MiB of each GPU's memory, instead of a share. None (the default): see partial.",
        config=True,
    )
    filters = Dict(help='Which GPUs, such as {"name": "V100"}. Empty (the default): any.', config=True)
    require = Bool(
        False,
        help="Whether the kernel shall not start without its GPUs. By default it starts, and gets them in its turn.",
        config=True,
    )
    grace_s = Float(
        5.0,
        help="How long a dead kernel may take to be restarted before its GPUs are given back, in seconds.",
        config=True,
    )

    _lease: KernelLease | None = None
    _watch: asyncio.Task | None = None

    # -- the kernel's life

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        kwargs = await super().pre_launch(**kwargs)
        environment = kwargs.setdefault("env", dict(os.environ))
        for name in (LEASE, PENDING, PENDING_LEASE, REFUSED):
            environment.pop(name, None)  # the server's own are none of the kernel's
        self._unwatch()
        if self._lease is not None and self._lease.ended:
            await self._release()
        if self._lease is None:
            try:
                wish = self._wish(environment)
            except InvalidRequest as e:
                environment[REFUSED] = str(e)
                self.log.warning("No GPU for kernel %s: %s", self.kernel_id, e)
                if self.require:
                    raise _unavailable(e) from None
                wish = None
            if wish is not None:
                await self._begin(wish)
        if self._lease is not None:
            environment.update(self._lease.environment())
        if {LEASE, PENDING, REFUSED} & set(environment):
            kwargs["cmd"] = _with_extension(kwargs.get("cmd"))
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        try:
            connection = await super().launch_kernel(cmd, **kwargs)
        except BaseException:
            await self._release()  # nobody will call cleanup
            raise
        if self._lease is not None:
            self._watch = asyncio.ensure_future(self._watch_process())
        return connection

    async def cleanup(self, restart: bool = False) -> None:
        await super().cleanup(restart=restart)
        if not restart:
            await self._release()
        elif self._lease is not None and self._watch is None:
            self._watch = asyncio.ensure_future(self._watch_process())

    async def get_provisioner_info(self) -> dict[str, Any]:
        info = await super().get_provisioner_info()
        if self._lease is not None:
            info["gpupool"] = {"lease": self._lease.id, "wish": self._lease.wish.asked()}
        return info

    async def load_provisioner_info(self, provisioner_info: dict) -> None:
        """A lease dies with the process that held it; the next start of the kernel asks for the same again."""
        await super().load_provisioner_info(provisioner_info)
        saved = provisioner_info.get("gpupool")
        if isinstance(saved, dict):
            try:
                self._saved = parse(saved.get("wish"), "the kernel's saved state")
            except InvalidRequest as e:
                self.log.warning("Kernel %s: %s", self.kernel_id, e)

    # -- its lease

    _saved: Wish | None = None

    def _wish(self, environment: dict[str, str]) -> Wish | None:
        if self.kernel_id is not None and wishes.knows(self.kernel_id):
            return wishes.take(self.kernel_id)
        if self._saved is not None:
            return self._saved
        notebook = environment.get(_SESSION)
        wish = of_notebook(notebook) if notebook else None
        if wish is not None:
            return wish
        return parse(
            {
                "num_gpus": self.num_gpus,
                "partial": self.partial,
                "memory_mib": self.memory_mib,
                "filters": dict(self.filters),
                "require": self.require,
            },
            "the kernelspec",
        )

    async def _begin(self, wish: Wish) -> None:
        name = os.environ.get(_SESSION) or ""
        label = f"kernel {self.kernel_id}" + (f" {Path(name).name}" if name else "")
        lease = self._lease = KernelLease(wish, label, lambda line: self.log.warning("%s", line))
        try:
            await asyncio.to_thread(lease.begin)
        except BaseException:
            await self._release()
            raise
        refusal = lease.refusal
        if wish.require and refusal is not None:
            await self._release()
            raise _unavailable(refusal)

    async def _release(self) -> None:
        self._unwatch()
        lease, self._lease = self._lease, None
        if lease is not None:
            await asyncio.shield(asyncio.to_thread(lease.release))

    async def _watch_process(self) -> None:
        """A kernel that died and is not started again has no use for its GPUs, and nobody may say so."""
        missing = 0.0
        step = min(0.5, self.grace_s / 4)
        while missing < self.grace_s:
            await asyncio.sleep(step)
            alive = self.process is not None and self.process.poll() is None
            missing = 0.0 if alive else missing + step
        self._watch = None
        self.log.info("Kernel %s is gone; its GPUs are given back", self.kernel_id)
        await self._release()

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()


def _with_extension(command: Any) -> Any:
    """ipykernel's command, if it is one of this Python's, with %gpupool loaded."""
    if not isinstance(command, list) or not command or "ipykernel_launcher" not in command:
        return command
    ours = os.path.realpath(command[0]) == os.path.realpath(sys.executable)
    flag = "--ext=jupyter_gpupool"
    return [*command, flag] if ours and flag not in command else command


def _unavailable(why: PoolError) -> HTTPError:
    """What JupyterLab shows beneath "Error Starting Kernel"."""
    message = f"The kernel wants a GPU and gets none: {why}"
    return HTTPError(503, message, reason=message)
