"""``attach()``: slices of the pool's GPUs for any Python process."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TypeVar

from .client.direct import CONNECTIONS, Connection, refuse_direct
from .client.keeper import Keeper
from .client.lease_environment import ChildrensLease
from .client.lease_holder import LeaseHolder, acquired, refuse_smaller
from .client.pool_finder import find_pool
from .client.requests import new_request
from .core import models
from .core.environment import LEASE
from .core.errors import InvalidRequest
from .core.models import LeaseState
from .transport.specs import AttachSpec, DeviceSpec

__all__ = ["AlreadyAttached", "Lease", "attach"]

T = TypeVar("T")


class AlreadyAttached(RuntimeError):
    """This process already holds a lease. A process holds one lease at a time."""


_attaching = threading.Lock()
_current: Lease | None = None


def attach(
    num_gpus: int = 1,
    memory_fraction: float | None = None,
    *,
    memory_mib: int | None = None,
    filters: Mapping[str, str] | None = None,
    spread: bool = False,
    never_park: bool = False,
    wait: bool = True,
    timeout: float | None = None,
    url: str | None = None,
    token: str | None = None,
    connection: Connection = "auto",
    label: str = "attach()",
    on_update: Callable[[models.Lease], None] | None = None,
    partial: float | None = None,
    mode: Connection | None = None,
    news: Callable[[models.Lease], None] | None = None,
) -> Lease:
    """Request slices of GPUs from the pool and attach them to this process as its CUDA devices.

    It does not matter whether ``torch`` has been imported before. The lease ends with :meth:`Lease.release`, at the
    end of a ``with`` block, or when the process ends, however it ends. Processes that this one starts meanwhile find
    the lease in their environment and use it too.

    Example::

        import jupyter_gpupool
        import torch

        with jupyter_gpupool.attach(num_gpus=2, memory_fraction=0.5) as lease:
            x = torch.ones(3, device="cuda:1")
            print(lease.devices, x.sum().item())

    Parameters:
        num_gpus: How many GPUs, each with a slice of its own.
        memory_fraction: Fraction of each GPU's memory, above 0 and at most 1.
            Default: 1 (whole GPUs), unless ``memory_mib`` is given.
        memory_mib: Memory of each slice in MiB, instead of ``memory_fraction``.
        filters: Attributes that the GPUs must have, all of them: ``name`` (a part of the GPU's name), ``server``,
            ``uuid``, ``index`` (on its server), ``emulated`` (``"true"`` or ``"false"``). Values are strings.
            Default: any GPU.
        spread: Allow GPUs of several servers where no single server has room for all.
        never_park: Keep the GPUs while the program is idle, even if others wait for them.
        wait: Queue until GPUs are free. If false, raise :exc:`NoCapacity` at once.
        timeout: Longest wait in the queue, in seconds. Default: no limit.
        url: Address of the pool, such as ``https://gpus.example:56001``. Default: ``GPUPOOL_URL``, else the servers
            in the installed bundle, else this user's running pool, else a new pool for this process.
        token: Token for the pool. Default: ``GPUPOOL_TOKEN``, else the bundle's.
        connection: ``"remote"`` computes in a worker on the GPU server; ``"direct"`` uses GPUs of this machine
            without a worker; ``"auto"`` chooses direct where that is possible.
        label: Text that others see beside the lease.
        on_update: Called about once a second, until the slices are attached, with the lease as a
            :class:`jupyter_gpupool.core.models.Lease`: its state and its position in the queue.
        partial: Alias of ``memory_fraction``.
        mode: Deprecated alias of ``connection``.
        news: Deprecated alias of ``on_update``.

    Returns:
        The lease, ACTIVE.

    Raises:
        InvalidRequest: An argument makes no sense.
        ImpossibleRequest: No GPUs of this pool could ever satisfy the request.
        NoCapacity: No GPUs are free and ``wait`` is false, or none became free within ``timeout``.
        LeaseEnded: The lease ended before it was attached, for example because it was released elsewhere.
        PoolUnreachable: No pool answers.
        Unauthenticated: The pool does not accept the token.
        AlreadyAttached: This process already holds a lease.
        RuntimeError: Neither PyTorch nor JAX is installed, or PyTorch's release is not supported.

    See also:
        :class:`Lease`; the command ``gpupool run``, which attaches slices to an unmodified program.
    """
    global _current
    memory_fraction = _either("memory_fraction", memory_fraction, "partial", partial)
    if mode is not None:
        _warn_renamed("mode", "connection")
        connection = (
            _either("connection", None if connection == "auto" else connection, "mode", mode) or "auto"
        )
    if news is not None:
        _warn_renamed("news", "on_update")
        on_update = _either("on_update", on_update, "news", news)
    if connection not in CONNECTIONS:
        raise InvalidRequest(f"connection must be one of {', '.join(CONNECTIONS)}, not {connection!r}")
    with _attaching:
        _refuse_second()
        session = _session()
        request, secret = new_request(
            num_gpus=num_gpus,
            partial=memory_fraction,
            memory_mib=memory_mib,
            filters=filters,
            spread=spread,
            never_park=never_park,
            wait=wait,
            label=label,
        )
        client, pool = find_pool(url, token)
        try:
            if connection == "direct":
                refuse_direct(pool)
            keeper = Keeper()
            keeper.expect(client, request.id)
        except BaseException:
            client.close()
            raise
        children = ChildrensLease()

        def update(lease: models.Lease) -> None:
            keeper.beat(lease.ttl_s)
            if on_update is not None:
                on_update(lease)

        def on_lost(reason: str) -> None:
            if (used := _session()) is not None:
                used.lose(reason)
            children.withdraw()

        def on_resized(spec: AttachSpec) -> None:
            if (used := _session()) is not None:
                used.resize(spec)
            children.resize(spec)

        with (
            _left_on_error(keeper, children),
            acquired(
                client,
                request,
                secret,
                connection=connection,
                timeout_s=timeout,
                on_update=update,
                on_lost=on_lost,
                on_resized=on_resized,
                on_waiting=_show_waiting,
            ) as holder,
        ):
            children.offer(holder.spec)
            if session is not None:
                session.activate(holder.spec)
            keeper.hold(holder.spec, children.config)
        _current = Lease(holder, keeper, children)
        return _current


def _show_waiting(position: int) -> None:
    """Tell the user why the program, or the cell, does not go on."""
    print(
        f"Waiting for the GPUs, which others have while this program was idle: position {position} in the queue "
        "(interrupt to stop waiting; nothing is lost)",
        file=sys.stderr,
        flush=True,
    )


class Lease:
    """Slices that this process holds. Use it as a context manager, or call :meth:`release`."""

    def __init__(self, holder: LeaseHolder, keeper: Keeper, children: ChildrensLease) -> None:
        self._holder = holder
        self._keeper = keeper
        self._children = children
        atexit.register(self.release)

    @property
    def id(self) -> str:
        """The lease's id, a uuid."""
        return self._holder.lease.id

    @property
    def slices(self) -> tuple[DeviceSpec, ...]:
        """The slices in device order: GPU name and uuid, limit and total memory in MiB, emulated or not."""
        return self._holder.spec.devices

    @property
    def spec(self) -> AttachSpec:
        """How this process reaches the workers."""
        return self._holder.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """PyTorch's names of the slices, such as ``("gpupool:0", "gpupool:1")``."""
        kind = "cuda" if self._holder.spec.mode == "direct" else "gpupool"
        return tuple(f"{kind}:{device.index}" for device in self.slices)

    @property
    def state(self) -> LeaseState:
        """ACTIVE, or the state in which the lease ended."""
        return self._holder.state()

    def resize(
        self,
        memory_fraction: float | None = None,
        *,
        memory_mib: int | None = None,
        partial: float | None = None,
    ) -> None:
        """Change the memory of every slice; the GPUs and all tensors stay.

        Parameters:
            memory_fraction: New size as a fraction of each GPU's memory, above 0 and at most 1.
            memory_mib: New size in MiB, instead of ``memory_fraction``.
            partial: Alias of ``memory_fraction``.

        Raises:
            PoolError: The GPU has no room to grow, or more memory is in use than the new size. Then nothing has
                changed.
        """
        memory_fraction = _either("memory_fraction", memory_fraction, "partial", partial)
        session = _session()
        in_use = [0 for _ in self.slices] if session is None else session.settle(self.spec)
        refuse_smaller(self.spec, in_use, memory_fraction, memory_mib)
        spec = self._holder.resize(memory_fraction, memory_mib)
        if session is not None:
            session.resize(spec)
        self._children.resize(spec)

    def release(self) -> None:
        """Release the slices; tensors on them are lost. Harmless when the lease has ended already."""
        global _current
        self._children.withdraw()
        if _current is self:
            _current = None
            if (session := _session()) is not None:
                session.deactivate()
        self._keeper.leave()
        self._holder.release()
        atexit.unregister(self.release)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __repr__(self) -> str:
        what = ", ".join(
            f"{name} {device.name} {device.limit_mib} MiB" for name, device in zip(self.devices, self.slices)
        )
        return f"<Lease {self.id} {self.state.value}: {what}>"


def current() -> Lease | None:
    """Return the lease that this process attached and has not released or lost; None without one."""
    return _current if _current is not None and not _current._holder.lost else None


def _refuse_second() -> None:
    """Raise AlreadyAttached if this process holds a lease; release one that has ended."""
    if _current is not None:
        if not _current._holder.lost:
            raise AlreadyAttached(
                f"this process holds lease {_current.id} already; call its release() before attaching another"
            )
        _current.release()
    if os.environ.get(LEASE):
        raise AlreadyAttached(
            f"this process has the lease that {LEASE} names, from `gpupool run`, `gpupool request` or the program that "
            "started it; "
            "use its devices, or unset the variable before Python starts"
        )


def check_torch() -> None:
    """Raise RuntimeError, with what to do, if neither PyTorch nor JAX is installed."""
    _session()


def _session() -> ModuleType | None:
    """Return the module that attaches slices to PyTorch, which it imports; None in a program of JAX without PyTorch.

    There an import of PyTorch attaches them at its end, see :mod:`.pytorch.client.autoload`.
    """
    if "torch" not in sys.modules and ("jax" in sys.modules or _has_only_jax()):
        return None
    return _import_session()


def _has_only_jax() -> bool:
    return importlib.util.find_spec("torch") is None and importlib.util.find_spec("jax") is not None


def _import_session() -> ModuleType:
    """Return the module that attaches slices, which needs PyTorch."""
    try:
        from .pytorch.client import session
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise RuntimeError("PyTorch is not installed here: pip install 'jupyter_gpupool[torch]'") from None
    return session


def _forked() -> None:
    global _current, _attaching
    if _current is not None:
        _current._keeper.forked()
    _current = None  # the lease is the parent's
    _attaching = threading.Lock()


if hasattr(os, "register_at_fork"):  # a system without it has no fork either
    os.register_at_fork(after_in_child=_forked)


def _either(name: str, value: T | None, alias: str, aliased: T | None) -> T | None:
    if value is not None and aliased is not None:
        raise InvalidRequest(f"give either {name} or its alias {alias}, not both")
    return value if aliased is None else aliased


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f"attach({old}=) is now attach({new}=)", DeprecationWarning, stacklevel=3)


@contextlib.contextmanager
def _left_on_error(keeper: Keeper, children: ChildrensLease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        children.withdraw()
        keeper.leave()
        raise
