"""The Python face: ``attach()`` gives any Python process slices of the pool's GPUs."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType

from . import holder
from .pool import models
from .pool.errors import InvalidRequest
from .pool.models import LeaseState
from .remote.autoload import VARIABLE
from .remote.specs import AttachSpec, DeviceSpec

__all__ = ["AlreadyAttached", "Lease", "attach"]


class AlreadyAttached(RuntimeError):
    """This process has a lease; a process has one at a time."""


_attaching = threading.Lock()
_current: Lease | None = None


def attach(
    num_gpus: int = 1,
    partial: float | None = None,
    *,
    memory_mib: int | None = None,
    filters: Mapping[str, str] | None = None,
    spread: bool = False,
    wait: bool = True,
    timeout: float | None = None,
    url: str | None = None,
    token: str | None = None,
    mode: str = "auto",
    label: str = "attach()",
    news: Callable[[models.Lease], None] = lambda lease: None,
) -> Lease:
    """Ask the pool for slices of ``num_gpus`` GPUs and make them this process's CUDA devices.

    ``partial`` is the share of each GPU's memory, above 0 and at most 1; ``memory_mib`` asks for MiB per GPU
    instead; with neither it is whole GPUs. ``filters`` chooses GPUs: ``name`` (a part of it), ``server``,
    ``uuid``, ``index``, ``emulated``. ``spread``: they may be of several servers, where none has room for all.
    Waits for its turn, at most ``timeout`` seconds; with ``wait=False`` not at all. ``url`` and ``token`` name the
    pool (default: GPUPOOL_URL and GPUPOOL_TOKEN, else the one this user runs, else one is started). ``mode``:
    "remote", "direct" (GPUs in this machine only) or "auto".
    ``label`` is what others read of its use; ``news`` is called about once a second while it waits.

    It does not matter whether torch has been imported before. The lease ends with :meth:`Lease.release`, at
    the end of a ``with`` block, or with the process, however that ends.

    Raises :mod:`jupyter_gpupool.pool.errors` with the pool's reason, AlreadyAttached when this process has a
    lease that lives, and RuntimeError where PyTorch is missing or not supported.
    """
    global _current
    if mode not in holder.MODES:
        raise InvalidRequest(f"mode is one of {', '.join(holder.MODES)}, not {mode!r}")
    with _attaching:
        _refuse_second()
        remote = _import_remote()
        client, pool = holder.find_pool(url, token)
        hold: holder.Hold | None = None
        try:
            if mode == "direct":
                holder.refuse_direct(pool)
            request, secret = holder.new_request(
                num_gpus=num_gpus,
                partial=partial,
                memory_mib=memory_mib,
                filters=filters,
                spread=spread,
                wait=wait,
                label=label,
            )
            granted = holder.acquire(client, request, news=news, timeout_s=timeout)
            try:
                spec = holder.attach_spec(client, granted, secret, holder.attach_mode(mode, granted))
            except BaseException:
                client.release(granted.id)
                raise
            hold = holder.Hold(client, granted, spec, on_lost=remote.lose, on_resized=remote.resize)
            if spec.mode == "direct":
                os.environ["CUDA_VISIBLE_DEVICES"] = holder.visible_devices(spec)
            remote.activate(spec)
        except BaseException:
            if hold is not None:
                hold.release()
            client.close()
            raise
        _current = Lease(hold)
        return _current


class Lease:
    """Slices that this process holds; use it as a context manager, or call :meth:`release`."""

    def __init__(self, hold: holder.Hold) -> None:
        self._hold = hold
        atexit.register(self.release)

    @property
    def id(self) -> str:
        return self._hold.lease.id

    @property
    def slices(self) -> tuple[DeviceSpec, ...]:
        """What was granted: name, uuid, memory limit and total in MiB, emulated or not; in device order."""
        return self._hold.spec.devices

    @property
    def spec(self) -> AttachSpec:
        """How its worker is reached."""
        return self._hold.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The slices by the names that PyTorch knows them by: ``("gpupool:0", "gpupool:1")``."""
        kind = "cuda" if self._hold.spec.mode == "direct" else "gpupool"
        return tuple(f"{kind}:{device.index}" for device in self.slices)

    @property
    def state(self) -> LeaseState:
        """ACTIVE, or how the lease ended."""
        return self._hold.state()

    def resize(self, partial: float | None = None, *, memory_mib: int | None = None) -> None:
        """Have another share of the same GPUs' memory; tensors stay where they are.

        Raises :mod:`jupyter_gpupool.pool.errors` when there is no room to grow, or more is in use than the
        slices would have; then everything is as it was.
        """
        remote = _import_remote()
        holder.refuse_smaller(self.spec, remote.settle(self.spec), partial, memory_mib)
        remote.resize(self._hold.resize(partial, memory_mib))

    def release(self) -> None:
        """Give the slices back; tensors on them are gone. Harmless when it has ended already."""
        global _current
        if _current is self:
            _current = None
            _import_remote().deactivate()
        self._hold.release()
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
    """The lease that this process attached and has not released."""
    return _current if _current is not None and not _current._hold.lost else None


def _refuse_second() -> None:
    """One lease per process; one that has ended makes room for the next."""
    if _current is not None:
        if not _current._hold.lost:
            raise AlreadyAttached(
                f"this process holds lease {_current.id} already; call its release() before attaching another"
            )
        _current.release()
    if os.environ.get(VARIABLE):
        raise AlreadyAttached(
            f"this process has the lease that {VARIABLE} names, from `gpupool run` or `gpupool request`; "
            "use its devices, or unset the variable before Python starts"
        )


def check_torch() -> None:
    """Raise RuntimeError, saying what to do, where there is no PyTorch to attach slices to."""
    _import_remote()


def _import_remote() -> ModuleType:
    """The data plane, which needs PyTorch."""
    try:
        from .remote import session
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise RuntimeError("PyTorch is missing here: pip install 'jupyter_gpupool[torch]'") from None
    return session


def _forked() -> None:
    global _current, _attaching
    _current = None  # the lease is the parent's
    _attaching = threading.Lock()


os.register_at_fork(after_in_child=_forked)
